"""Several adapters on one model: each is what it is alone, and the base is left what it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from banks import RULES, alone, folder, furthest, logits, together, tokens_of, trained
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lowrank
from lowrank.adapters import AdaLoRA, Adapted, Bottleneck, Full, LoRA, NotMergeable, Prefix, Prompt, VeRA
from lowrank.adapters.inject import adapter_state, apply, hooks, named_trainable
from lowrank.adapters.plan import Rules, plan
from lowrank.adapters.sites import adapted
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.errors import ConfigError

Make = Callable[..., Any]


@pytest.fixture(params=["make_llama", "make_gpt2"])
def make(request: pytest.FixtureRequest) -> Make:
    """Either architecture."""
    return request.getfixturevalue(request.param)


def requires_grad(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


# Switching


def test_each_adapter_computes_what_it_does_alone_bit_for_bit(make: Make, tmp_path: Path) -> None:
    model, ids = together(make, tmp_path), tokens_of(2, 9)
    for name in (*RULES, None):
        with lowrank.use(model, name):
            assert torch.equal(logits(model, ids), logits(alone(make, name), ids)), name


def test_the_first_is_in_use_and_loading_another_changes_nothing(make: Make, tmp_path: Path) -> None:
    model, ids = together(make, tmp_path, "a"), tokens_of(2, 9)
    first = logits(model, ids)
    assert torch.equal(first, logits(alone(make, "a"), ids))
    load_adapter(model, folder(make, "b", tmp_path), name="b")
    assert torch.equal(logits(model, ids), first)


def test_use_holds_until_further_notice_and_as_a_context_until_its_end(make: Make, tmp_path: Path) -> None:
    model, ids = together(make, tmp_path), tokens_of(2, 9)
    wanted = {name: logits(alone(make, name), ids) for name in (*RULES, None)}
    lowrank.use(model, "b")
    with lowrank.use(model, "c"), lowrank.use(model, None):
        assert torch.equal(logits(model, ids), wanted[None])
    assert torch.equal(logits(model, ids), wanted["b"])
    with pytest.raises(ZeroDivisionError), lowrank.use(model, "c"):
        _ = 1 / 0
    assert torch.equal(logits(model, ids), wanted["b"])


def test_an_adapter_without_a_name_becomes_the_default_one(make: Make, tmp_path: Path) -> None:
    model, ids = alone(make, "b"), tokens_of(2, 9)
    parameters, before = named_trainable(model), logits(model, ids)
    load_adapter(model, folder(make, "a", tmp_path), name="a")
    assert torch.equal(logits(model, ids), before)
    renamed = {name.replace(".adapter.", ".adapter.default."): p for name, p in parameters.items()}
    assert all(named_trainable(model)[name] is p for name, p in renamed.items())
    with lowrank.use(model, "a"):
        assert torch.equal(logits(model, ids), logits(alone(make, "a"), ids))


def test_switching_looks_up_one_name_however_many_are_resident(llama: LlamaForCausalLM) -> None:
    rules: Rules = {"all-linear": partial(LoRA, r=1)}
    for n in range(40):
        apply(llama, plan(llama, rules), name=f"n{n}")
    calls: list[nn.Module] = []
    for _, site in adapted(llama):
        for member in site.adapter.children():
            member.register_forward_hook(lambda module, *_: calls.append(module))
    with lowrank.use(llama, "n17"):
        logits(llama, tokens_of(1, 4))
    assert calls == [site.adapter.get_submodule("n17") for _, site in adapted(llama)]


# The bare base


@pytest.mark.parametrize("name", [*RULES])
def test_disable_is_the_bare_base_and_restores_what_requires_grad(name: str, make: Make) -> None:
    model, ids = alone(make, name), tokens_of(2, 9)
    site, _ = next(iter(adapted(model)))
    for parameter in model.get_submodule(site).adapter.parameters():
        parameter.requires_grad_(False)  # one site frozen by hand
    before, grads = logits(model, ids), requires_grad(model)
    with lowrank.disable(model):
        assert torch.equal(logits(model, ids), logits(make(), ids))
        assert requires_grad(model) == grads
    assert requires_grad(model) == grads
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(ZeroDivisionError), lowrank.disable(model):
        _ = 1 / 0
    assert torch.equal(logits(model, ids), before)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's own calls of transformers
def test_peft_thaws_a_frozen_adapter_when_it_disables_it_and_we_do_not(make_llama: Make, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"])).requires_grad_(False)
    with theirs.disable_adapter():
        pass
    assert sum(requires_grad(theirs).values()) == 4  # A and B of two layers: they train now

    ours = trained(make_llama(), {"q_proj": partial(LoRA, r=2)}).requires_grad_(False)
    with lowrank.disable(ours):
        pass
    named = together(make_llama, tmp_path, "ab")
    lowrank.freeze(named, "a")
    frozen = requires_grad(named)
    with lowrank.disable(named), lowrank.use(named, "a"):
        pass
    assert not any(requires_grad(ours).values())
    assert requires_grad(named) == frozen


def test_disable_gives_back_the_base_that_an_adapters_start_had_changed(make: Make, tokens: Tensor) -> None:
    kept, lost = make(), make()
    rules: Rules = {"all-linear": partial(LoRA, r=2, init="pissa")}
    apply(kept, plan(kept, rules))
    apply(lost, plan(lost, rules), keep_base=False)
    with lowrank.disable(kept):
        assert torch.equal(logits(kept, tokens), logits(make(), tokens))
    with pytest.raises(ConfigError, match="the original was not kept"):
        lowrank.disable(lost)


def test_disable_refuses_where_there_is_no_bare_base(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match="carries no adapter"):
        lowrank.disable(llama)
    apply(llama, plan(llama, {"*norm*": Full, "q_proj": LoRA}))
    with pytest.raises(ConfigError, match="what they were before is not kept"):
        lowrank.disable(llama)


# Blocks and backbones


@pytest.mark.parametrize("rules", [{"blocks": Bottleneck}, {"backbone": Prompt}, {"backbone": Prefix}])
def test_methods_of_blocks_and_backbones_are_used_for_the_whole_batch(
    rules: Rules, make_llama: Make, tmp_path: Path, tokens: Tensor
) -> None:
    first = trained(make_llama(), rules)
    wanted = logits(first, tokens)
    with lowrank.disable(first):
        assert torch.equal(logits(first, tokens), logits(make_llama(), tokens))
    model = together(make_llama, tmp_path, "a")
    load_adapter(model, save_adapter(first, tmp_path / "whole"), name="whole")
    for choice in ("whole", ["whole", "whole"]):
        with lowrank.use(model, choice):
            assert torch.equal(logits(model, tokens), wanted)
    with pytest.raises(ConfigError, match=r"'whole' adapts model.*use it for the whole batch"):
        lowrank.use(model, ["whole", "a"])
    with lowrank.use(model, ["a", None]):  # it is resident, and in nobody's way
        assert furthest(logits(model, tokens)[1], logits(make_llama(), tokens)[1]) <= 1e-6
    with lowrank.use(model, "a"):  # nor in that of a merge
        merged, _ = lowrank.merge(model)
        assert furthest(logits(merged, tokens), logits(model, tokens)) <= 1e-5
    assert not any(isinstance(module, Adapted) for module in merged.modules())
    with lowrank.use(model, "whole"), pytest.raises(NotMergeable):
        lowrank.merge(model)
    with lowrank.disable(first), pytest.raises(ConfigError, match="disabled"):
        lowrank.merge(first)


# Training


def test_one_trains_while_another_is_frozen(make_llama: Make, tmp_path: Path, tokens: Tensor) -> None:
    model = together(make_llama, tmp_path, "ab")
    optimizer = torch.optim.AdamW(named_trainable(model).values(), lr=1e-2, weight_decay=0.1)
    model(input_ids=tokens).logits.square().mean().backward()
    lowrank.freeze(model, "a")  # which has gradients
    names = named_trainable(model)
    assert names
    assert all(".adapter.b." in name for name in names)
    before = {name: t.detach().clone() for name, t in adapter_state(model).items()}
    with lowrank.use(model, ["a", "b"]):
        model(input_ids=tokens).logits.square().mean().backward()
    optimizer.step()
    changed = {name for name, t in adapter_state(model).items() if not torch.equal(t, before[name])}
    assert changed == set(names)


def test_unfreeze_thaws_what_trained_before_and_no_more(llama: LlamaForCausalLM) -> None:
    apply(llama, plan(llama, {"q_proj": partial(LoRA, freeze_a=True), "v_proj": VeRA}), name="a")
    apply(llama, plan(llama, {"q_proj": LoRA}), name="b")
    before = requires_grad(llama)
    lowrank.freeze(llama, "a")
    assert not any(grad for name, grad in requires_grad(llama).items() if ".a." in name)
    lowrank.unfreeze(llama, "a")
    assert requires_grad(llama) == before


def test_gradients_of_a_mixed_batch_are_those_of_each_adapters_rows(make_llama: Make, tmp_path: Path) -> None:
    names, ids = ["a", "b", "a", None], tokens_of(4, 7)
    model = together(lambda: make_llama().double(), tmp_path, "ab")

    def gradients(choice: Any, rows: list[int]) -> dict[str, Tensor]:
        model.zero_grad()
        with lowrank.use(model, choice):
            model(input_ids=ids[rows]).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in named_trainable(model).items() if p.grad is not None}

    mixed = gradients(names, [0, 1, 2, 3])
    apart = gradients("a", [0, 2]) | gradients("b", [1])
    assert mixed.keys() == apart.keys()
    assert all(furthest(mixed[name], apart[name]) <= 1e-10 for name in apart)


def test_penalties_and_hooks_are_of_the_adapters_that_train(llama: LlamaForCausalLM) -> None:
    for name in ("a", "b"):
        apply(llama, plan(llama, {"q_proj": AdaLoRA}), name=name)

    def penalties() -> float:
        with torch.no_grad():
            return sum(float(site.adapter.penalty()) for _, site in adapted(llama))

    both = penalties()
    assert len(hooks(llama, 10)) == 2
    lowrank.freeze(llama, "a")
    assert 0 < penalties() < both
    (hook,) = hooks(llama, 10)
    assert hook.adapters.keys() == {path for path, _ in adapted(llama)}
