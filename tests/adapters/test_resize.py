"""Another rank on a live model: growing changes no output, shrinking as little as can be, and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from banks import furthest, logits, together, trained
from sums import changes, error
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lowrank
from lowrank.adapters import IA3, DoRA, LoRA, VeRA
from lowrank.adapters.inject import apply, current_plan, named_trainable
from lowrank.adapters.plan import Rules, plan
from lowrank.adapters.sites import adapted
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.errors import ConfigError

Make = Callable[..., Any]
RULES: Rules = {"all-linear": partial(LoRA, r=4, alpha=6.0), "embedding": partial(LoRA, r=4, rslora=True)}


def ranks(model: nn.Module) -> set[Any]:
    return {site.adapter.r for _, site in adapted(model)}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    optimizer.zero_grad()
    model(input_ids=ids).logits.square().mean().backward()
    optimizer.step()


# Growing


@pytest.mark.parametrize("rules", [RULES, {"all-linear": partial(DoRA, r=4)}], ids=["lora", "dora"])
@pytest.mark.parametrize("to", [5, 16, 40])
def test_growing_changes_no_output(rules: Rules, to: int, model: nn.Module, tokens: Tensor) -> None:
    trained(model, rules)
    before = logits(model, tokens)
    report = lowrank.resize(model, to)
    assert ranks(model) == {to}
    assert furthest(logits(model, tokens), before) <= 5e-6  # rounding: a product of another width adds in another order
    assert {site.error for site in report.sites} == {0.0}


def test_growing_changes_no_output_in_fp64_either(llama64: LlamaForCausalLM, tokens: Tensor) -> None:
    model = trained(llama64, RULES).double()
    before = logits(model, tokens)
    lowrank.resize(model, 9)
    assert furthest(logits(model, tokens), before) <= 1e-14


def test_new_directions_train_and_are_keyed(make_llama: Make, tokens: Tensor) -> None:
    def rows(seed: int, rules: Rules) -> Tensor:
        model = trained(make_llama(), rules)
        lowrank.resize(model, 6, seed=seed)
        return model.model.layers[1].self_attn.q_proj.adapter.A[4:].detach()

    assert torch.equal(rows(0, RULES), rows(0, {"q_proj": RULES["all-linear"]}))  # whatever else is resized
    assert not torch.equal(rows(0, RULES), rows(1, RULES))
    model = trained(make_llama(), RULES)
    lowrank.resize(model, 6)
    model(input_ids=tokens).logits.square().mean().backward()
    for name, parameter in named_trainable(model).items():
        if name.endswith(".B"):
            assert parameter.grad is not None
            assert parameter.grad[:, 4:].abs().sum(0).min() > 0, name


# Shrinking


@pytest.mark.parametrize("to", [1, 3])
def test_shrinking_is_the_best_approximation_and_reports_its_true_error(to: int, model: nn.Module) -> None:
    trained(model, RULES)
    before = changes(model)
    report = lowrank.resize(model, to)
    after = changes(model)
    for site in report.sites:
        S = torch.linalg.svdvals(before[site.path])
        best = float(S[to:].norm() / S.norm())
        assert abs(error(after[site.path], before[site.path]) - best) <= 1e-6
        assert abs(site.error - best) <= 1e-6
    assert f"error {report.sites[0].error:.2e}" in str(report)


@pytest.mark.parametrize("init", ["default", "zeros"])
def test_an_adapter_that_does_nothing_yet_can_still_train_afterwards(
    init: str, llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    apply(llama, plan(llama, {"all-linear": partial(LoRA, r=4, init=init)}))
    before = logits(llama, tokens)
    lowrank.resize(llama, 2)
    assert torch.equal(logits(llama, tokens), before)
    llama(input_ids=tokens).logits.square().mean().backward()
    for _, site in adapted(llama):
        assert any(p.grad is not None and p.grad.any() for p in site.adapter.parameters())


def test_growing_and_shrinking_back_is_the_same_change(model: nn.Module, tokens: Tensor) -> None:
    trained(model, RULES)
    before = logits(model, tokens)
    lowrank.resize(model, 11)
    report = lowrank.resize(model, 4)
    assert furthest(logits(model, tokens), before) <= 1e-5
    assert max(site.error for site in report.sites) <= 1e-6


# The optimizer

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_goes_on_with_the_same_parameters(kind: str, llama: LlamaForCausalLM, tokens: Tensor) -> None:
    model = trained(llama, RULES)
    names = named_trainable(model)
    optimizer = OPTIMIZERS[kind](names.values())
    for _ in range(2):
        step(model, optimizer, tokens)
    for to in (7, 2):
        lowrank.resize(model, {"all-linear": to}, optimizer)
        assert all(p is names[name] for name, p in named_trainable(model).items())
        for parameter in names.values():
            for what, value in optimizer.state[parameter].items():
                assert value.shape in ((), parameter.shape), what
                assert value.isfinite().all()
                assert what == "step" or (parameter.shape != () and value.any()), what
        before = {name: p.detach().clone() for name, p in names.items()}
        step(model, optimizer, tokens)
        assert all(not torch.equal(p, before[name]) for name, p in names.items())


def test_means_of_gradients_are_those_of_the_turned_factors(llama64: LlamaForCausalLM, tokens: Tensor) -> None:
    """A momentum that is one gradient is, after a shrink that loses nothing, the gradient of the new factors."""
    model = trained(llama64, RULES).double()
    lowrank.resize(model, 7)
    optimizer = torch.optim.SGD(named_trainable(model).values(), lr=0.0, momentum=0.9)
    step(model, optimizer, tokens)
    report = lowrank.resize(model, 4, optimizer)
    assert max(site.error for site in report.sites) <= 1e-12
    momentum = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in named_trainable(model).items()}
    model.zero_grad()
    model(input_ids=tokens).logits.square().mean().backward()
    for name, parameter in named_trainable(model).items():
        assert parameter.grad is not None
        assert furthest(momentum[name], parameter.grad) <= 1e-8, name


def test_old_directions_keep_their_moments_and_new_ones_begin_with_the_mean_square(
    llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    model = trained(llama, RULES)
    names = named_trainable(model)
    optimizer = torch.optim.AdamW(names.values(), lr=1e-3)
    step(model, optimizer, tokens)
    old = {name: dict(optimizer.state[p]) for name, p in names.items()}
    lowrank.resize(model, 6, optimizer)
    for name, parameter in names.items():
        state, dim = optimizer.state[parameter], 0 if name.endswith(".A") else 1
        assert state["step"] == 1
        for what, new in (("exp_avg", 0.0), ("exp_avg_sq", old[name]["exp_avg_sq"].mean(dim, keepdim=True))):
            assert torch.equal(state[what].narrow(dim, 0, 4), old[name][what])
            assert (state[what].narrow(dim, 4, 2) == new).all()


def test_squares_of_one_direction_follow_as_the_square_of_its_mean(make_llama: Make, tokens: Tensor) -> None:
    """Several directions add up, as squares of what does not correlate do."""
    for direction in range(4):
        model = trained(make_llama().double(), RULES).double()
        names = named_trainable(model)
        optimizer = torch.optim.AdamW(names.values(), lr=1e-3)
        step(model, optimizer, tokens)
        for name, parameter in names.items():
            state, dim = optimizer.state[parameter], 0 if name.endswith(".A") else 1
            state["exp_avg"].zero_().select(dim, direction).fill_(3.0)
            state["exp_avg_sq"].zero_().select(dim, direction).fill_(9.0)
        lowrank.resize(model, 2, optimizer)
        for parameter in names.values():
            state = optimizer.state[parameter]
            assert state["exp_avg"].any()
            assert furthest(state["exp_avg_sq"], state["exp_avg"].square()) <= 1e-12


def test_a_resized_run_goes_on_as_if_nothing_had_happened(make_llama: Make, tokens: Tensor) -> None:
    """SGD without the new directions: grown, its old directions take the same steps."""
    one, two = (trained(make_llama().double(), {"q_proj": partial(LoRA, r=4)}).double() for _ in range(2))
    optimizers = [torch.optim.SGD(named_trainable(m).values(), lr=1e-3, momentum=0.9) for m in (one, two)]
    for model, optimizer in zip((one, two), optimizers, strict=True):
        step(model, optimizer, tokens)
    lowrank.resize(two, 6, optimizers[1])
    for model, optimizer in zip((one, two), optimizers, strict=True):
        step(model, optimizer, tokens)
    for name, parameter in named_trainable(one).items():
        grown = named_trainable(two)[name]
        assert furthest(grown[:4] if name.endswith(".A") else grown[:, :4], parameter) <= 1e-12


# Plans, files, banks


@pytest.mark.parametrize("to", [2, 9])
def test_the_plan_and_the_file_follow(to: int, model: nn.Module, tokens: Tensor, tmp_path: Path) -> None:
    bare = type(model)(model.config).eval()
    bare.load_state_dict(model.state_dict())
    trained(model, {"all-linear": partial(LoRA, r=4, alpha=6.0, rslora=True, init="orthogonal"), "embedding": LoRA})
    lowrank.resize(model, {"all-linear@0": to, "embedding": to})
    rows = current_plan(model).rows
    assert {row.options.get("r") for row in rows} == {to, 4}
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in named_trainable(model).values())
    loaded = load_adapter(bare, save_adapter(model, tmp_path))
    assert current_plan(loaded) == current_plan(model)
    assert furthest(logits(loaded, tokens), logits(model, tokens)) <= 1e-6


def test_one_of_several_is_resized(make_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = together(make_llama, tmp_path, "ab")
    plans = [current_plan(model, name) for name in "ab"]
    with pytest.raises(ConfigError, match="several adapters"):
        lowrank.resize(model, 8)
    with lowrank.use(model, ["a", "b"]):
        before = logits(model, tokens)
        lowrank.resize(model, 8, name="a")
        assert furthest(logits(model, tokens), before) <= 1e-6
    assert {row.options["r"] for row in current_plan(model, "a").rows} == {8}
    assert current_plan(model, "b") == plans[1]


# Bad input


def test_what_cannot_be_resized_is_refused_with_nothing_changed(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    rules: Rules = {
        "q_proj": partial(LoRA, r=40),
        "k_proj": partial(LoRA, init="pissa"),
        "v_proj": VeRA,
        "o_proj": IA3,
        "up_proj": LoRA,
    }
    model = trained(llama, rules)
    optimizer = torch.optim.Adafactor([p for p in named_trainable(model).values() if p.ndim == 2], lr=1e-3)
    step(model, optimizer, tokens)
    before, plans = logits(model, tokens), current_plan(model)
    refused: list[tuple[Any, str]] = [
        ({"v_proj": 4}, "carries VeRA; the rank of LoRA and DoRA alone"),
        ({"o_proj": 4}, "carries IA3; the rank of LoRA and DoRA alone"),
        (4, "k_proj: its start"),
        ({"up_proj": 0}, "r: 0 is not allowed; a positive integer"),
        ({"up_porj": 4}, "'up_porj' names no adapter.*Nearest: 'up_proj'"),
        ({"down_proj": 4}, "'down_proj' names no adapter"),
        ({"k_proj": 4}, r"init=pissa\) took a part of rank 8 out of the base"),
        ({"q_proj": 36}, "r: 36 is not allowed; a change of this layer has rank 32 at most"),
        ({"up_proj": 4, "*.mlp.*": 5}, "is given two ranks, 4 and 5"),
        ({"up_proj": 4}, "the optimizer's row_var of .*, is not a mean of gradients"),
    ]
    for r, message in refused:
        with pytest.raises(ConfigError, match=message):
            lowrank.resize(model, r, optimizer)
    with pytest.raises(ConfigError, match="the model carries no adapter"):
        lowrank.resize(nn.Linear(4, 4), 4)
    assert torch.equal(logits(model, tokens), before)
    assert current_plan(model) == plans
