"""The update over one memory is the update a parameter at a time: values, states, names, whatever hooks do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import furthest, loop_of, same, values
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowrank.keys import key
from lowrank.train import flat, optim
from lowrank.train.checkpoint import Saved, read, save
from lowrank.train.flat import ELEMENTWISE, Flat, why_not
from lowrank.train.hooks import Hook
from lowrank.train.optim import groups, load_state, set_lr, state_tensors
from lowrank.train.update import EachParameter, Update

SHAPES: dict[str, tuple[int, ...]] = {
    **{"a.q.A": (4, 64), "a.q.B": (64, 4), "a.norm": (64,), "b.v.A": (3, 7), "b.v.B": (7, 3), "b.scale": ()},
    **{"c.long": (5, 300)},
}
RULES = [{"match": "*.B", "lr_ratio": 16}, {"match": "b.*", "weight_decay": 0.3}]
OPTIONS: dict[str, dict[str, Any]] = {
    **{cls.__name__: {} for cls in ELEMENTWISE},
    **{"AdamW amsgrad": {"amsgrad": True}, "AdamW fused": {"fused": True}, "AdamW foreach": {"foreach": True}},
    **{"SGD momentum": {"momentum": 0.9, "nesterov": True}, "SGD fused": {"momentum": 0.9, "fused": True}},
    **{"RMSprop centered": {"centered": True, "momentum": 0.9}, "Adam maximize": {"maximize": True}},
}
Gradients = Callable[[int, str], Tensor | None]


def parameters(dtype: torch.dtype = torch.float64, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Any:
    return {n: nn.Parameter(torch.randn(s, generator=key(0, n), dtype=dtype)) for n, s in shapes.items()}


def optimizer(kind: str, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    cls = getattr(torch.optim, kind.partition(" ")[0])
    if cls is torch.optim.Rprop:  # has no weight decay
        return cls(groups(trained, RULES, lr=1e-2, weight_decay=0.0), **OPTIONS[kind])
    return cls(groups(trained, RULES, lr=1e-2, weight_decay=0.1), **OPTIONS[kind])


def gradient(step: int, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPES[name], generator=key(step, name), dtype=dtype) * (1 + step % 3)


def steps(update: Update, first: int, last: int, given: Gradients = gradient, max_norm: float = 4.0) -> list[float]:
    """As the loop makes them; the norms."""
    norms = []
    for step in range(first, last + 1):
        update.clear()
        set_lr(update.optimizer, 1 / step)  # type: ignore[attr-defined]
        for name, parameter in update.parameters.items():  # type: ignore[attr-defined]
            parameter.grad = given(step, name)
        update.gathered()
        norm = update.norm()
        update.clip(max_norm, norm, float(norm))
        update.step()
        norms.append(float(norm))
    return norms


def pair(kind: str, **changes: Any) -> tuple[EachParameter, Flat]:
    return EachParameter(optimizer(kind, parameters(**changes))), Flat(optimizer(kind, parameters(**changes)))


def state(update: Any) -> dict[str, Tensor]:
    return state_tensors(update.optimizer)[0]


@pytest.mark.parametrize("kind", OPTIONS)
def test_twenty_steps_are_those_of_each_parameter_by_itself(kind: str) -> None:
    each, whole = pair(kind)
    assert steps(each, 1, 20) == pytest.approx(steps(whole, 1, 20), rel=1e-12)
    assert furthest(values_of(each), values_of(whole)) < 1e-9
    assert state(each).keys() == state(whole).keys()
    for name, held in state(each).items():
        assert (held.shape, held.dtype) == (state(whole)[name].shape, state(whole)[name].dtype)
        torch.testing.assert_close(held, state(whole)[name], rtol=1e-9, atol=1e-12)


def test_one_kernel_moves_them_all_and_the_memory_is_one_a_group() -> None:
    _, whole = pair("AdamW fused")
    steps(whole, 1, 2)
    for group in whole.optimizer.param_groups:
        held = [[whole.optimizer.state[p][what] for p in group["params"]] for what in ("exp_avg", "exp_avg_sq", "step")]
        for one in [group["params"], [p.grad for p in group["params"]], *held]:
            assert len({tensor.untyped_storage().data_ptr() for tensor in one}) == 1
    with torch.profiler.profile() as seen:
        whole.step()
    assert [event.count for event in seen.key_averages() if event.key == "aten::_fused_adamw_"] == [4]  # one a group
    assert len(whole.optimizer.param_groups) == 4 < len(whole.parameters)


def test_the_same_kernels_give_the_same_bits_where_nothing_is_clipped() -> None:
    even = {f"{'ab'[n % 2]}.{n}.{what}": (16, 48) if what == "A" else (48, 16) for n in range(9) for what in "AB"}
    each, whole = pair("AdamW fused", dtype=torch.float32, shapes=even)
    drawn: Gradients = lambda step, name: torch.randn(even[name], generator=key(step, name))  # noqa: E731
    for update in (each, whole):
        steps(update, 1, 20, drawn, math.inf)
    assert same(each.parameters, whole.parameters)
    assert same(state(each), state(whole))


@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused", "SGD", "SGD momentum", "Adagrad", "NAdam"])
@pytest.mark.parametrize("missing", [{1}, {3}, {2, 3, 7}, set(range(1, 10))], ids=str)
def test_a_parameter_without_a_gradient_is_left_alone_with_its_state(kind: str, missing: set[int]) -> None:
    given: Gradients = lambda step, name: None if step in missing and name == "a.q.A" else gradient(step, name)  # noqa: E731
    said: list[str] = []
    each = EachParameter(optimizer(kind, parameters()))
    whole = Flat(optimizer(kind, parameters()), said.append)
    before = values_of(whole)["a.q.A"]
    steps(each, 1, 9, given)
    steps(whole, 1, 9, given)
    assert furthest(values_of(each), values_of(whole)) < 1e-9
    assert torch.equal(before, whole.parameters["a.q.A"]) == (len(missing) == 9)
    assert state(each).keys() == state(whole).keys()
    assert all(torch.allclose(held, state(whole)[name], rtol=1e-9) for name, held in state(each).items())
    assert len(said) == 1


def values_of(update: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in update.parameters.items()}


def test_nothing_is_said_of_a_run_in_which_all_have_gradients() -> None:
    said: list[str] = []
    steps(Flat(optimizer("AdamW", parameters()), said.append), 1, 5)
    assert said == []


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("missing", [set(), {2}], ids=["whole", "one without a gradient"])
def test_a_saved_state_goes_on_bit_for_bit_and_in_the_other_way_as_well(
    kind: str, missing: set[int], tmp_path: Path
) -> None:
    given: Gradients = lambda step, name: None if step in missing and name == "b.v.B" else gradient(step, name)  # noqa: E731
    _, whole = pair(kind)
    steps(whole, 1, 3, given)
    tensors, plain = state_tensors(whole.optimizer)
    saved = read(save(tmp_path, 3, Saved({"optimizer": tensors, "adapter": values_of(whole)}, {"optimizer": plain})))
    others = [cls(optimizer(kind, parameters())) for cls in (Flat, EachParameter)]
    for other in others:
        with torch.no_grad():
            for name, parameter in other.parameters.items():
                parameter.copy_(saved.tensors["adapter"][name])
        load_state(other.optimizer, saved.tensors.get("optimizer", {}), saved.state["optimizer"])
        steps(other, 4, 7)
    steps(whole, 4, 7)
    assert same(whole.parameters, others[0].parameters)
    assert same(state(whole), state(others[0]))
    assert furthest(values_of(whole), values_of(others[1])) < 1e-9


def test_a_state_put_into_an_optimizer_that_has_stepped_is_that_of_each_parameter() -> None:
    """Of a checkpoint in which a parameter's count is behind the others'."""
    kind = "AdamW fused"
    given: Gradients = lambda step, name: None if step == 2 and name == "a.q.A" else gradient(step, name)  # noqa: E731
    each, whole = pair(kind)
    steps(each, 1, 3, given)
    steps(whole, 1, 5)
    load_state(whole.optimizer, *state_tensors(each.optimizer))
    with torch.no_grad():
        for name, parameter in whole.parameters.items():
            parameter.copy_(each.parameters[name])
    assert {float(state(whole)[f"{name}|step"]) for name in ("a.q.A", "a.norm")} == {2.0, 3.0}
    for update in (each, whole):
        steps(update, 4, 6)
    assert furthest(values_of(each), values_of(whole)) < 1e-9


class Meddles(Hook):
    """What hooks may do to gradients and parameters between backward and the next step."""

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self.trained = list(trained.values())

    def before_update(self, step: int) -> None:
        one, two, three, *_ = self.trained
        assert one.grad is not None
        assert two.grad is not None
        one.grad.mul_(0.5)
        two.grad = two.grad * 2
        three.grad = None if step == 2 else three.grad

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        one, two, *_ = self.trained
        one[0].zero_()
        two.data = two.data + 1e-3


def test_what_hooks_write_counts(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    loops = [loop_of(make_llama().double(), updating=updating, max_norm=0.3) for updating in (EachParameter, Flat)]
    for loop in loops:
        loop.hooks = [Meddles(loop.parameters)]
        loop.run(5)
    assert furthest(values(loops[0]), values(loops[1])) < 1e-9


def test_a_whole_loop_ends_where_the_other_does(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    loops = [loop_of(make_llama().double(), updating=updating, max_norm=0.3) for updating in (EachParameter, Flat)]
    for loop in loops:
        loop.run(8)
    assert furthest(values(loops[0]), values(loops[1])) < 1e-9
    assert loops[0].state.recent == pytest.approx(loops[1].state.recent, rel=1e-9)


def test_a_write_is_seen_by_whoever_goes_by_a_tensors_version() -> None:
    _, whole = pair("AdamW fused")
    before = {name: p._version for name, p in whole.parameters.items()}
    steps(whole, 1, 1)
    assert all(p._version > before[name] for name, p in whole.parameters.items())


def test_tied_weights_stay_tied() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    whole = Flat(torch.optim.SGD(groups({"w": first.weight}, [], lr=1.0, weight_decay=0.0)))
    start = first.weight.detach().clone()
    (first(torch.ones(1, 4)).sum() + second(torch.ones(1, 4)).sum()).backward()
    whole.gathered()
    whole.step()
    assert first.weight is second.weight
    torch.testing.assert_close(second.weight.detach(), start - 2)


def test_dtypes_lie_apart_and_move_as_they_would() -> None:
    def mixed() -> dict[str, nn.Parameter]:
        whole = parameters(torch.float32)
        return {n: nn.Parameter(p.detach().bfloat16()) if n.startswith("a") else p for n, p in whole.items()}

    updates = [cls(optimizer("AdamW", mixed())) for cls in (EachParameter, Flat)]
    for update in updates:
        steps(update, 1, 5, lambda step, name: gradient(step, name, update.parameters[name].dtype), math.inf)  # noqa: B023
    assert same(*(update.parameters for update in updates))


@pytest.mark.parametrize("way", [EachParameter, Flat])
def test_gradients_are_cut_however_little_they_are_too_long(way: Callable[[Any], Update]) -> None:
    for max_norm in (0.5, 0.9, 0.999, 0.99999, 1.0, 2.0):
        weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
        update = way(torch.optim.SGD(groups({"w": weight}, [], lr=1.0, weight_decay=0.0)))
        weight.grad = torch.full((4, 4), 0.25, dtype=torch.float64)  # of norm 1
        update.gathered()
        update.clip(max_norm, update.norm(), float(update.norm()))
        assert float(weight.grad.norm()) == pytest.approx(min(max_norm, 1.0), rel=2e-6)


def test_the_norm_of_millions_of_entries_is_right_to_seven_digits() -> None:
    whole = Flat(torch.optim.SGD(groups({"w": nn.Parameter(torch.zeros(3_000_000))}, [], lr=1.0, weight_decay=0.0)))
    wide = torch.rand(3_000_000, generator=key(0))
    whole.parameters["w"].grad = wide
    whole.gathered()
    assert float(whole.norm()) == pytest.approx(float(wide.double().norm()), rel=1e-7)


def test_afterwards_every_parameter_has_a_memory_of_its_own(tmp_path: Path) -> None:
    _, whole = pair("AdamW")
    steps(whole, 1, 2)
    before = values_of(whole)
    whole.release()
    save_file({name: p.detach() for name, p in whole.parameters.items()}, tmp_path / "x.safetensors")
    assert same(load_file(tmp_path / "x.safetensors"), before)


def test_what_cannot_lie_in_one_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(trained: Mapping[str, nn.Parameter], cls: Any = torch.optim.SGD, fused: bool = True) -> str | None:
        return why_not(cls(groups(trained, [], lr=1.0, weight_decay=0.0), **({"fused": True} if fused else {})))

    shared = torch.zeros(2, 4, 4)
    assert reason(parameters()) is None
    assert reason(parameters(), torch.optim.Adafactor, fused=False) == "not entry by entry"
    assert reason(parameters(), fused=False) == "no fused kernel, and small tensors stay in a CPU's cache"
    assert reason({"a": nn.Parameter(shared[0]), "b": nn.Parameter(shared[1])}) == (
        "a tensor that trains shares its memory with others"
    )
    monkeypatch.setattr(flat, "LARGE", 1000)
    assert reason({"a": nn.Parameter(torch.zeros(1000, 1000))}) == "4 MB train"


def test_a_fused_kernel_is_chosen_where_there_is_one_and_nobody_has_chosen() -> None:
    given = list(parameters().values())
    assert optim.fused(torch.optim.AdamW, {}, given) == {"fused": True}
    assert optim.fused(torch.optim.AdamW, {"foreach": True}, given) == {}
    assert optim.fused(torch.optim.RMSprop, {}, given) == {}
    assert optim.fused(type("Mine", (torch.optim.AdamW,), {}), {}, given) == {}
