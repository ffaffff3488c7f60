"""A twin is the same tensors under modules of its own: what is done to it the base does not see."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank import fast
from lowrank.adapters import DoRA, Full, LoRA, Prefix
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.methods.bitfit import BitFit
from lowrank.adapters.plan import Rules, plan
from lowrank.adapters.sites import adapted
from lowrank.errors import ConfigError
from lowrank.fast import linear
from lowrank.fast.recompute import recompute
from lowrank.models import attention
from lowrank.models.fingerprint import fingerprint
from lowrank.models.twin import LINE, copied, twin
from lowrank.quant.convert import quantize

METHODS: dict[str, Rules] = {
    "lora": {"all-linear": partial(LoRA, r=2)},
    "pissa": {"all-linear": partial(LoRA, r=2, init="pissa")},
    "loftq": {"all-linear": partial(LoRA, r=2, init="loftq")},
    "dora": {"all-linear": partial(DoRA, r=2)},
    "prefix": {"backbone": partial(Prefix, length=2)},
    "full": {"*": Full},
    "bitfit": {"*": BitFit},
}
OWN = ("full", "bitfit")  # methods that train the base's own parameters


def resident(model: nn.Module) -> Any:
    """As a run has loaded it: frozen, its linear layers and its attention replaced."""
    linear.fuse(model.eval().requires_grad_(False))
    assert attention.install(model) is None
    return model


def train(model: nn.Module, tokens: Tensor, steps: int = 2) -> list[float]:
    """The losses of so many steps on the fast path, in training mode."""
    optimizer = torch.optim.AdamW(named_trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def modes(model: nn.Module) -> list[Any]:
    """All about a model's modules but for its tensors."""
    return [(id(m), m.training, sorted(vars(m)), len(m._forward_hooks), list(m._modules)) for m in model.modules()]


def outputs(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def planned_twin(base: Any, method: str) -> nn.Module:
    planned = plan(base, METHODS[method])
    return apply(twin(base, [row.path for row in planned.rows] if method in OWN else ()), planned, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_what_trains_on_a_twin_leaves_the_base_as_it_was(
    gpt2: Any, tokens: Tensor, method: str, quantised: bool
) -> None:
    if quantised and method in ("full", "loftq"):
        return  # refused: neither is for weights that are NF4 already
    base = resident(quantize(gpt2) if quantised else gpt2)
    before = fingerprint(base), modes(base), outputs(base, tokens), base.config.to_dict()

    model = planned_twin(base, method)
    fast.fuse(model)
    recompute(model, "selective")
    losses = train(model, tokens)
    model.set_attn_implementation("eager")

    assert losses[1] != losses[0]
    assert (fingerprint(base), modes(base)) == before[:2]
    assert torch.equal(outputs(base, tokens), before[2])
    assert base.config.to_dict() == before[3]
    assert base.config._attn_implementation == attention.NAME
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_tensors_are_the_bases_and_modules_are_not(model: Any, quantised: bool) -> None:
    base = resident(quantize(model) if quantised else model)
    made = twin(base)

    assert [id(t) for t in made.state_dict(keep_vars=True).values()] == [
        id(t) for t in base.state_dict(keep_vars=True).values()
    ]
    assert [id(b) for b in made.buffers()] == [id(b) for b in base.buffers()]
    assert {id(m) for m in made.modules()}.isdisjoint(id(m) for m in base.modules())
    assert made.get_output_embeddings().weight is base.get_output_embeddings().weight


def test_tied_weights_stay_tied_in_a_copy_too(gpt2: Any) -> None:
    base = resident(gpt2)
    made: Any = twin(base, ["transformer.wte.weight"])

    assert made.lm_head.weight is made.transformer.wte.weight
    assert made.lm_head.weight is not base.lm_head.weight
    assert torch.equal(made.lm_head.weight, base.lm_head.weight)
    assert made.transformer.wpe.weight is base.transformer.wpe.weight


def test_every_forward_that_is_set_on_an_instance_is_the_twins_own(llama: Any, tokens: Tensor) -> None:
    base = apply(resident(llama), plan(llama, METHODS["lora"]), 0)
    fast.fuse(base)
    recompute(base, "block")
    made = twin(base)

    own = {id(m) for m in made.modules()}
    bound = [vars(m)["forward"].__self__ for m in made.modules() if "forward" in vars(m)]
    assert bound
    assert all(id(module) in own for module in bound)
    assert torch.equal(outputs(made, tokens), outputs(base, tokens))
    seen = []
    base.register_forward_hook(lambda *_: seen.append("base"))
    train(made, tokens, 1)
    assert seen == []


def test_a_twin_calls_its_own_hooks_and_none_of_the_bases_modules(llama: Any, tokens: Tensor) -> None:
    base = resident(llama)
    calls: list[str] = []
    for module in base.modules():
        module.register_forward_hook(lambda module, *_: calls.append(str(id(module))))
    made: Any = twin(base)
    made.model.layers[0].register_forward_pre_hook(lambda *_: calls.append("own"))
    outputs(made, tokens)

    assert "own" in calls
    assert {str(id(m)) for m in made.modules()} >= set(calls) - {"own"}
    calls.clear()
    outputs(base, tokens)
    assert "own" not in calls


def test_twins_train_as_the_model_itself_would(make_llama: Callable[..., Any], tokens: Tensor) -> None:
    base, rules = resident(make_llama()), METHODS["lora"]
    models = [apply(twin(base), plan(base, rules), seed) for seed in (0, 1, 0)]
    alone = apply(resident(make_llama()), plan(base, rules), 0)
    for model in (*models, alone):
        fast.fuse(model)
    first, other, second, wanted = (train(model, tokens, 3) for model in (*models, alone))

    assert first == second == wanted != other


def test_a_twins_adapters_are_gone_with_it(llama: Any, tokens: Tensor) -> None:
    base = resident(llama)
    model = apply(twin(base), plan(base, METHODS["lora"]), 0)
    fast.fuse(model)
    train(model, tokens, 1)
    held = [weakref.ref(site.adapter) for _, site in adapted(model)]
    del model
    gc.collect()
    assert held
    assert all(one() is None for one in held)


@pytest.mark.parametrize("skipped", [0, 1, 3, 8])
def test_a_copy_begins_at_the_same_place_of_a_cache_line(skipped: int) -> None:
    source = nn.Parameter(torch.arange(40.0)[skipped:][:30].view(5, 6), requires_grad=False)
    made = copied(source)

    assert torch.equal(made, source)
    assert not made.requires_grad
    assert made.data_ptr() % LINE == source.data_ptr() % LINE
    assert made.untyped_storage().nbytes() == made.nbytes
    assert made.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()


def test_a_name_that_is_no_parameter_is_refused(llama: Any) -> None:
    with pytest.raises(ConfigError, match=r"layers\.9.*not a parameter of this model"):
        twin(llama, ["model.layers.9.mlp.up_proj.weight"])
