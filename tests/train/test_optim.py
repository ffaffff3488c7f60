"""Groups by ordered rules over names, and an optimizer's state that goes by them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from lowrank.compose import compose
from lowrank.errors import ConfigError
from lowrank.keys import key
from lowrank.train.checkpoint import Saved, read, save
from lowrank.train.optim import groups, load_state, set_lr, state_tensors

Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "adamw": lambda made: torch.optim.AdamW(made),
    "amsgrad": lambda made: torch.optim.AdamW(made, amsgrad=True),
    "sgd": lambda made: torch.optim.SGD(made),
    "nesterov": lambda made: torch.optim.SGD(made, momentum=0.9, nesterov=True),
    "adagrad": lambda made: torch.optim.Adagrad(made),
    "rmsprop": lambda made: torch.optim.RMSprop(made, centered=True, momentum=0.9),
    "adafactor": lambda made: torch.optim.Adafactor(made),
    "nadam": lambda made: torch.optim.NAdam(made),
    "asgd": lambda made: torch.optim.ASGD(made),
    "adamw8bit": lambda made: bitsandbytes.optim.AdamW8bit(made, min_8bit_size=128),
    "lion8bit": lambda made: bitsandbytes.optim.Lion8bit(made, min_8bit_size=128),
    "ademamix8bit": lambda made: bitsandbytes.optim.AdEMAMix8bit(made, min_8bit_size=128),
    "lamb8bit": lambda made: bitsandbytes.optim.LAMB8bit(made, min_8bit_size=128),
    "paged_adamw8bit": lambda made: bitsandbytes.optim.PagedAdamW8bit(made, min_8bit_size=128),
    "moves_its_groups": lambda made: MovesItsGroups(made),
}


class MovesItsGroups(torch.optim.Optimizer):
    """What it learns of all parameters stands in their group, as Prodigy's does: a number, a tensor, a pair."""

    def __init__(self, params: list[dict[str, Any]]) -> None:
        super().__init__(params, {"lr": 1e-2, "d": 1.0, "seen": torch.zeros(()), "range": (0.0, 0.0), "fixed": 3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            norm = sum(float(p.grad.norm()) for p in group["params"] if p.grad is not None)
            group["d"] = 0.5 * group["d"] + 0.1 * norm
            group["seen"] = group["seen"] + 1
            group["range"] = (min(group["range"][0], norm), max(group["range"][1], norm))
            group["steps"] = group.get("steps", 0) + 1
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * group["d"] * group["range"][1] / group["steps"])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """bitsandbytes says, and it is so, that nothing is paged on a CPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield


def named() -> dict[str, nn.Parameter]:
    shapes: dict[str, tuple[int, ...]] = {
        "a.q_proj.adapter.A": (4, 64),
        "a.q_proj.adapter.B": (64, 4),
        "a.norm.weight": (64,),
        "b.v.adapter.B": (64, 4),
    }
    return {name: nn.Parameter(torch.randn(shape, generator=key(0, name))) for name, shape in shapes.items()}


def by_name(made: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Parameter name → (peak learning rate, weight decay)."""
    return {name: (group["peak_lr"], group["weight_decay"]) for group in made for name in group["names"]}


def test_every_parameter_is_in_exactly_one_group_under_its_own_name() -> None:
    parameters = named()
    made = groups(parameters, [{"match": "*.B", "lr": 3e-3}], lr=1e-3, weight_decay=0.1)
    placed = {name: p for group in made for name, p in zip(group["names"], group["params"], strict=True)}
    assert placed.keys() == parameters.keys()
    assert all(placed[name] is parameters[name] for name in parameters)
    assert sum(len(group["params"]) for group in made) == len(parameters)


def test_weight_decay_is_never_on_vectors() -> None:
    found = by_name(groups(named(), [], lr=1e-3, weight_decay=0.1))
    assert found.pop("a.norm.weight") == (1e-3, 0.0)
    assert set(found.values()) == {(1e-3, 0.1)}
    scalar = groups({"s": nn.Parameter(torch.zeros(()))}, [], lr=1.0, weight_decay=0.1)
    assert by_name(scalar) == {"s": (1.0, 0.0)}


@pytest.mark.parametrize("rate", [{"lr": 16e-3}, {"lr_ratio": 16}], ids=str)
def test_lora_plus_is_a_rule(rate: dict[str, float]) -> None:
    found = by_name(groups(named(), [{"match": "*.B", **rate}], lr=1e-3, weight_decay=0.1))
    assert found["a.q_proj.adapter.A"] == (1e-3, 0.1)
    assert found["a.q_proj.adapter.B"] == found["b.v.adapter.B"] == (16e-3, 0.1)


def test_a_ratio_follows_the_learning_rate() -> None:
    for lr in (1e-3, 2e-4):
        found = by_name(groups(named(), [{"match": "*.B", "lr_ratio": 8}], lr=lr, weight_decay=0.0))
        assert found["b.v.adapter.B"][0] == 8 * found["a.q_proj.adapter.A"][0] == 8 * lr


def test_the_choice_lora_plus_makes_b_of_every_site_16_times_as_fast() -> None:
    settings = compose(["optim=lora_plus", "optim.lr=1e-3"]).optim
    found = by_name(groups(named(), settings.groups, lr=settings.lr, weight_decay=settings.weight_decay))
    assert {name for name, (rate, _) in found.items() if rate == 16e-3} == {"a.q_proj.adapter.B", "b.v.adapter.B"}
    assert {rate for rate, _ in found.values()} == {1e-3, 16e-3}


def test_the_first_rule_that_fits_decides_and_what_it_leaves_out_is_the_default() -> None:
    rules = [
        {"match": "a.q*.B", "weight_decay": 0.0},
        {"match": "*.B", "lr": 5e-3},
        {"match": "*norm*", "weight_decay": 0.2},
    ]
    found = by_name(groups(named(), rules, lr=1e-3, weight_decay=0.1))
    assert found["a.q_proj.adapter.B"] == (1e-3, 0.0)
    assert found["b.v.adapter.B"] == (5e-3, 0.1)
    assert found["a.norm.weight"] == (1e-3, 0.2)  # a rule may say so


def test_a_rule_that_matches_nothing_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"optim\.groups: '\*\.BB' matches no parameter .* Nearest: '\*\.B'"):
        groups(named(), [{"match": "*.BB", "lr": 1.0}], lr=1e-3, weight_decay=0.0)


def test_a_rule_to_which_earlier_ones_leave_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'b\.\*' matches no parameter that an earlier rule left"):
        groups(named(), [{"match": "*", "lr": 1.0}, {"match": "b.*", "lr": 2.0}], lr=1e-3, weight_decay=0.0)


def test_the_schedule_keeps_the_groups_ratio() -> None:
    optimizer = torch.optim.SGD(groups(named(), [{"match": "*.B", "lr": 16e-3}], lr=1e-3, weight_decay=0.0))
    for factor in (0.5, 1.0, 0.25):
        assert set_lr(optimizer, factor) == pytest.approx(1e-3 * factor)
        assert {group["lr"] for group in optimizer.param_groups} == {1e-3 * factor, 16e-3 * factor}


def step(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], number: int) -> None:
    for name, parameter in parameters.items():
        parameter.grad = torch.randn(parameter.shape, generator=key(number, name))
    optimizer.step()


def make(kind: str, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return OPTIMIZERS[kind](groups(parameters, [{"match": "*.B", "lr": 3e-2}], lr=1e-2, weight_decay=0.1))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_saved_state_goes_on_bit_for_bit_though_parameters_come_in_another_order(kind: str, tmp_path: Path) -> None:
    parameters = named()
    optimizer = make(kind, parameters)
    for number in (1, 2):
        step(optimizer, parameters, number)
    tensors, plain = state_tensors(optimizer)
    path = save(tmp_path, 2, Saved({"optimizer": tensors}, {"optimizer": plain}))
    other = {name: nn.Parameter(parameters[name].detach().clone()) for name in reversed(parameters)}
    resumed = make(kind, other)
    saved = read(path)
    load_state(resumed, saved.tensors.get("optimizer", {}), saved.state["optimizer"])
    for number in (3, 4):
        step(optimizer, parameters, number)
        step(resumed, other, number)
    assert all(torch.equal(parameters[name], other[name]) for name in parameters)
    for name, parameter in parameters.items():
        theirs = resumed.state[other[name]]
        for what, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == theirs[what].dtype
                assert torch.equal(value, theirs[what])
            else:
                assert value == theirs[what]
    settings = {n: g for g in resumed.param_groups for n in g["names"]}
    for group in optimizer.param_groups:
        theirs = settings[group["names"][0]]
        assert group.keys() == theirs.keys()
        assert all(group[what] == theirs[what] for what in group if what not in ("params", "names"))


def test_state_is_named_by_parameter_and_holds_only_tensors_and_json() -> None:
    parameters = named()
    optimizer = make("adamw", parameters)
    step(optimizer, parameters, 1)
    tensors, plain = state_tensors(optimizer)
    assert {name.rpartition("|")[0] for name in tensors} == parameters.keys()
    assert {name.rpartition("|")[2] for name in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    assert json.loads(json.dumps(plain)) == plain


def test_loading_copies_and_does_not_share_memory() -> None:
    parameters = named()
    optimizer = make("adamw", parameters)
    step(optimizer, parameters, 1)
    tensors, plain = state_tensors(optimizer)
    kept = {name: t.clone() for name, t in tensors.items()}
    other = named()
    resumed = make("adamw", other)
    load_state(resumed, tensors, plain)
    step(resumed, other, 2)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_only_what_the_optimizer_itself_moved_in_a_group_is_kept() -> None:
    parameters = named()
    optimizer = make("moves_its_groups", parameters)
    step(optimizer, parameters, 1)
    tensors, plain = state_tensors(optimizer)
    assert {key.rpartition("|")[2] for key in [*tensors, *plain]} == {
        "group:d", "group:seen", "group:range", "group:steps",
    }  # fmt: skip
    other = make("moves_its_groups", named())
    for group in other.param_groups:
        group["lr"], group["fixed"] = 5.0, 4  # what the configuration now says
    load_state(other, tensors, plain)
    assert {(group["lr"], group["fixed"]) for group in other.param_groups} == {(5.0, 4)}
    assert [group["range"] for group in other.param_groups] == [group["range"] for group in optimizer.param_groups]


class OwnMemory(bitsandbytes.optim.AdamW8bit):
    """Its moments lie in memory that it alone can provide, as a paged optimizer's do on a GPU."""

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        made = super().get_state_buffer(p, dtype)
        made.provided = True
        return made


def test_moments_come_back_in_the_memory_that_the_optimizer_provides() -> None:
    parameters, other = named(), named()
    optimizer = OwnMemory(groups(parameters, [], lr=1e-2, weight_decay=0.0), min_8bit_size=128)
    step(optimizer, parameters, 1)
    resumed = OwnMemory(groups(other, [], lr=1e-2, weight_decay=0.0), min_8bit_size=128)
    load_state(resumed, *state_tensors(optimizer))
    for name in parameters:
        mine, theirs = optimizer.state[parameters[name]], resumed.state[other[name]]
        for what in ("state1", "state2"):
            assert theirs[what].provided
            assert torch.equal(theirs[what], mine[what])


@pytest.mark.cuda
def test_paged_moments_are_paged_again() -> None:
    def made(parameter: nn.Parameter) -> torch.optim.Optimizer:
        group = groups({"w": parameter}, [], lr=1e-2, weight_decay=0.0)
        return bitsandbytes.optim.PagedAdamW8bit(group)

    first, second = (nn.Parameter(torch.ones(512, 512, device="cuda:0")) for _ in range(2))
    optimizer, resumed = made(first), made(second)
    first.grad = torch.randn(512, 512, device="cuda:0")
    optimizer.step()
    with torch.no_grad():
        second.copy_(first)
    load_state(resumed, *state_tensors(optimizer))
    assert resumed.state[second]["state1"].is_paged
    for parameter, each in ((first, optimizer), (second, resumed)):
        parameter.grad = torch.full((512, 512), 0.5, device="cuda:0")
        each.step()
    assert torch.equal(first, second)


def test_a_state_that_a_file_cannot_hold_is_refused_by_name() -> None:
    parameters = named()
    optimizer = make("sgd", parameters)
    optimizer.state[parameters["a.norm.weight"]]["history"] = [torch.zeros(1)]
    with pytest.raises(ConfigError, match=r"SGD holds a\.norm\.weight\|history as list"):
        state_tensors(optimizer)


def test_state_before_the_first_step_is_empty() -> None:
    assert state_tensors(make("adamw", named())) == ({}, {})
