"""Every method in conf/adapter, held to what its class promises: a new YAML is tested by being there."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lowrank.adapters import Adapted, Adapter, NotMergeable
from lowrank.adapters.base import shape
from lowrank.adapters.inject import adapter_state, apply, current_plan, named_trainable, remove
from lowrank.adapters.merge import merge
from lowrank.adapters.plan import InjectionPlan, Rules, option_names, plan
from lowrank.adapters.preflight import check_gradients, check_subclasses, check_trainable
from lowrank.adapters.sites import site_kind
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.errors import ConfigError
from lowrank.keys import Clock, key
from lowrank.quant.convert import quantize

FILES = sorted((Path(__file__).parents[2] / "conf" / "adapter").glob("*.yaml"))
BASES = ("llama", "gpt2", "nf4-llama")


@dataclass(frozen=True)
class Method:
    """A method as its YAML has it."""

    cls: type[Adapter]
    targets: Any
    options: dict[str, Any]

    @property
    def wraps(self) -> bool:
        return "parameter" not in self.cls.sites

    def rules(self, **changes: Any) -> Rules:
        chosen = {**self.options, **changes}
        if isinstance(self.targets, dict):
            return {pattern: partial(self.cls, **{**chosen, **own}) for pattern, own in self.targets.items()}
        patterns = [self.targets] if isinstance(self.targets, str) else self.targets
        return {pattern: partial(self.cls, **chosen) for pattern in patterns}


def read(path: Path) -> Method:
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    options.pop("exclude", None)
    module, _, name = options.pop("_target_").rpartition(".")
    return Method(getattr(importlib.import_module(module), name), options.pop("targets"), options)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def method(request: pytest.FixtureRequest) -> Method:
    return read(request.param)


@pytest.fixture(params=BASES)
def fresh(
    request: pytest.FixtureRequest,
    method: Method,
    make_llama: Callable[..., LlamaForCausalLM],
    make_gpt2: Callable[..., GPT2LMHeadModel],
) -> Callable[[], Any]:
    """Makes the base, the same each time."""
    quantised = request.param == "nf4-llama"
    if quantised and not method.wraps:
        pytest.skip("trains the base's own weights, which NF4 refuses: tested below")
    make = make_gpt2 if request.param == "gpt2" else make_llama
    return (lambda: quantize(make())) if quantised else make


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits
    return found


def moved(model: Any) -> Any:
    """Every trainable value shifted by 0.05 · a normal draw, so that nothing is at its special start."""
    for name, parameter in named_trainable(model).items():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=key(1, name)).to(parameter))
    return model


def planned(model: Any, method: Method, **changes: Any) -> tuple[Any, InjectionPlan]:
    made = plan(model, method.rules(**changes))
    return apply(model, made, seed=3), made


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in adapter_state(model).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_yaml_names_an_adapter_its_targets_and_every_option_of_its_constructor(method: Method) -> None:
    assert issubclass(method.cls, Adapter)
    assert method.targets
    assert set(method.options) == set(option_names(method.cls))


def test_the_yaml_explains_every_key_where_it_stands() -> None:
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for above, line in zip(["", *lines], lines, strict=False):
            assert line.startswith("#") or above.startswith("#"), f"{path.name}: {line}"


def test_it_starts_as_the_identity_where_it_promises_to(
    method: Method, fresh: Callable[[], Any], tokens: Tensor
) -> None:
    model = fresh()
    before = logits(model, tokens)
    after = logits(planned(model, method)[0], tokens)
    match method.cls.identity_at_start:
        case True:
            assert torch.equal(after, before)
        case "rounding":
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_exactly_the_planned_parameters_train_and_each_adapter_gets_a_gradient(
    method: Method, fresh: Callable[[], Any], tokens: Tensor
) -> None:
    model, made = planned(fresh(), method)
    names = named_trainable(model)
    assert {name.partition(".adapter.")[0] for name in names} == {row.path for row in made.rows}
    check_trainable(model, made, list(names.values()))
    check_subclasses(model)
    assert current_plan(model) == made
    if method.wraps:
        assert {p.dtype for p in names.values()} == {torch.float32}
    model(input_ids=tokens).logits.square().mean().backward()
    check_gradients(model)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_a_site_are_its_finite_differences(
    training: bool, method: Method, fresh: Callable[[], Any]
) -> None:
    """In fp64, in evaluation mode and, with dropout where the method has it, at a set time in training."""
    changes = {"dropout": 0.3} if "dropout" in method.options else {}
    clock = Clock(1)
    clock.set(1, 0)
    model = fresh()
    apply(model, plan(model, method.rules(**changes)), clock=clock)
    wrapped = [m for m in moved(model.double()).train(training).modules() if isinstance(m, Adapted)]
    for site in {type(m.base): m for m in wrapped}.values():  # one of each kind
        if site_kind(site.base) == "other":
            continue  # a block's inputs are its model's own: the whole model is differentiated below
        x = torch.randn(3, shape(site.base)[1], generator=key(0, "x"), dtype=torch.float64, requires_grad=True)
        x = torch.tensor([[1, 2], [2, 0]]) if site_kind(site.base) == "embedding" else x
        parameters = [p for p in site.adapter.parameters() if p.requires_grad]
        inputs = [t for t in (x, *parameters) if t.is_floating_point()]
        assert torch.autograd.gradcheck(lambda *_, site=site, x=x: site(x), inputs, fast_mode=True)


def test_the_whole_models_gradient_is_its_finite_difference(
    method: Method, make_gpt2: Callable[..., GPT2LMHeadModel], tokens: Tensor
) -> None:
    """Along random directions of everything that trains; on GPT-2, whose norms compute in fp64."""
    model = moved(planned(make_gpt2(), method)[0].double())
    parameters = named_trainable(model)
    weights = torch.randn((*tokens.shape, 64), generator=key(0, "weights"), dtype=torch.float64)

    def value() -> Tensor:
        found: Tensor = (model(input_ids=tokens).logits * weights).sum()
        return found

    gradients = torch.autograd.grad(value(), list(parameters.values()))
    for draw in range(3):
        along = [torch.randn(p.shape, generator=key(draw, name), dtype=p.dtype) for name, p in parameters.items()]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, along, strict=True))
        ends = []
        for step in (1e-6, -2e-6, 1e-6):  # to +h, from there to −h, and back
            with torch.no_grad():
                for parameter, direction in zip(parameters.values(), along, strict=True):
                    parameter.add_(direction, alpha=step)
                ends.append(float(value()))
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-6, abs=1e-4)


def test_a_sites_start_does_not_depend_on_which_others_there_are(method: Method, fresh: Callable[[], Any]) -> None:
    model, made = planned(fresh(), method)
    start = copied(model)
    chosen = made.rows[len(made.rows) // 2]
    alone = InjectionPlan((chosen,), made.total_parameters)
    other = apply(fresh(), alone, seed=3)
    found = {name: p.detach() for name, p in named_trainable(other).items()}
    assert found
    assert all(torch.equal(value, start[name]) for name, value in found.items())


def test_the_same_seed_starts_the_same_and_draws_nothing_from_the_default_generator(
    method: Method, fresh: Callable[[], Any]
) -> None:
    models = [fresh(), fresh()]
    before = torch.get_rng_state()
    first, second = (copied(planned(model, method)[0]) for model in models)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, second)


def test_a_training_pass_at_a_set_time_repeats_bit_for_bit(
    method: Method, fresh: Callable[[], Any], tokens: Tensor
) -> None:
    clock = Clock(5)
    model = fresh()
    apply(model, plan(model, method.rules()), clock=clock)
    moved(model).train()
    runs = []
    for _ in range(2):
        clock.set(4, 2)
        torch.manual_seed(0)  # the model's own dropout
        found = model(input_ids=tokens).logits
        gradients = torch.autograd.grad(found.square().mean(), list(named_trainable(model).values()))
        runs.append([found.detach(), *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_saving_and_loading_is_exact(method: Method, fresh: Callable[[], Any], tokens: Tensor, tmp_path: Path) -> None:
    model, made = planned(fresh(), method)
    save_adapter(moved(model), tmp_path)
    other = load_adapter(fresh(), tmp_path)
    assert current_plan(other) == made
    assert same(copied(other), copied(model))
    assert torch.equal(logits(other, tokens), logits(model, tokens))


def test_the_merged_model_equals_the_wrapped_one_or_the_method_says_it_cannot_be(
    method: Method, fresh: Callable[[], Any], tokens: Tensor
) -> None:
    model = moved(planned(fresh(), method)[0].double())
    try:
        merged, _ = merge(model)
    except NotMergeable:
        return
    assert not any(isinstance(module, Adapted) for module in merged.modules())
    wrapped = logits(model, tokens)
    torch.testing.assert_close(logits(merged, tokens), wrapped, rtol=0, atol=1e-5 * float(wrapped.abs().max()))


def test_removing_puts_the_original_modules_back(method: Method, fresh: Callable[[], Any], tokens: Tensor) -> None:
    model = fresh()
    modules, before = dict(model.named_modules()), logits(model, tokens)
    moved(planned(model, method)[0])
    values = {name: p.clone() for name, p in model.named_parameters() if ".adapter." not in name}
    after = dict(remove(model).named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)
    assert not any(p.requires_grad for p in model.parameters())
    if method.wraps:
        assert torch.equal(logits(model, tokens), before)
    else:  # what was trained stays
        assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_follows_its_model_to_another_dtype(
    dtype: torch.dtype, method: Method, fresh: Callable[[], Any], tokens: Tensor
) -> None:
    model = moved(planned(fresh(), method)[0])
    before = logits(model, tokens)
    model.to(dtype)
    found = model(input_ids=tokens).logits
    assert found.dtype == dtype
    bound = (0.2 if dtype == torch.bfloat16 else 1e-4) * float(before.abs().max())
    torch.testing.assert_close(found.detach().float(), before, rtol=0, atol=bound)
    gradients = torch.autograd.grad(found.square().mean(), list(named_trainable(model).values()))
    assert {g.dtype for g in gradients} == {dtype}
    assert all(g.isfinite().all() for g in gradients)


def test_a_deep_copy_is_independent(method: Method, fresh: Callable[[], Any], tokens: Tensor) -> None:
    model = moved(planned(fresh(), method)[0])
    other, before = copy.deepcopy(model), logits(model, tokens)
    assert torch.equal(logits(other, tokens), before)
    moved(moved(other))
    assert torch.equal(logits(model, tokens), before)


@pytest.mark.parametrize("path", [path for path in FILES if not read(path).wraps], ids=lambda path: path.stem)
def test_a_method_that_trains_the_bases_own_weights_refuses_nf4(
    path: Path, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    with pytest.raises(ConfigError, match="NF4 weights cannot train"):
        plan(quantize(make_llama()), read(path).rules())
