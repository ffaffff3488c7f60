"""fp32, bf16 and fp16 in one small object; a scaled step is an unscaled one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import CPU, furthest, loop_of, same, values
from torch import nn
from transformers import LlamaForCausalLM

from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.loop import Loop
from lowrank.train.optim import groups, state_tensors
from lowrank.train.precision import Precision, resolve

pytestmark = pytest.mark.usefixtures("both_ways")


class Calls(Hook):
    def __init__(self) -> None:
        self.made: list[str] = []
        self.records: list[StepRecord] = []

    def before_update(self, step: int) -> None:
        self.made.append(f"before {step}")

    def after_update(self, step: int) -> None:
        self.made.append(f"after {step}")

    def after_step(self, record: StepRecord) -> None:
        self.records.append(record)


def fp16_loop(model: nn.Module, scale: float, **changes: Any) -> tuple[Loop, Calls]:
    calls = Calls()
    loop = loop_of(model, precision="fp16", hooks=[calls], **changes)
    loop.precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return loop, calls


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_keeps_parameters_gradients_and_moments_in_fp32(name: str, llama: LlamaForCausalLM) -> None:
    dtypes: set[torch.dtype] = set()

    class Looks(Hook):
        def before_update(self, step: int) -> None:
            dtypes.update(p.grad.dtype for p in loop.parameters.values() if p.grad is not None)

    loop = loop_of(llama, precision=name, hooks=[Looks()])
    loop.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=name == "fp16")
    loop.run(2)
    assert loop.state.step == 2
    assert dtypes == {torch.float32}
    assert {p.dtype for p in loop.parameters.values()} == {torch.float32}
    assert {t.dtype for t in state_tensors(loop.optimizer)[0].values()} == {torch.float32}


@pytest.mark.parametrize(("name", "bound"), [("bf16", 0.05), ("fp16", 0.01)])
def test_half_precision_stays_near_fp32(name: str, bound: float, make_llama: Callable[..., LlamaForCausalLM]) -> None:
    losses = []
    for precision in ("fp32", name):
        calls = Calls()
        loop = loop_of(make_llama(), precision=precision, hooks=[calls])
        loop.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=precision == "fp16")
        loop.run(3)
        losses.append([record.loss for record in calls.records])
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], abs=bound)


def test_clipping_comes_after_unscaling(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    def sgd(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups(parameters, [], lr=1.0, weight_decay=0.0))

    runs = []
    for scale in (32.0, 256.0, 2048.0):
        loop, calls = fp16_loop(make_llama(), scale, max_norm=0.1, optimizer=sgd)
        loop.run(1)
        runs.append((calls.records[0].grad_norm, values(loop)))
    assert runs[0][0] > 1
    for norm, reached in runs[1:]:
        assert norm == pytest.approx(runs[0][0], rel=1e-3)
        assert furthest(reached, runs[0][1]) < 1e-4  # a step of length 0.05


def test_a_penalty_counts_as_it_does_in_fp32(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    """Its gradient passes through the loss scale like the loss's."""
    norms = []
    for precision in ("fp32", "fp16"):
        calls = Calls()
        loop = loop_of(make_llama(), precision=precision, hooks=[calls])
        loop.precision.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=precision == "fp16")
        loop.penalty = lambda loop=loop: 10 * sum(p.square().sum() for p in loop.parameters.values())
        loop.run(1)
        norms.append(calls.records[0].grad_norm)
    assert norms[0] > 50  # the loss's alone is near 1
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_an_overflow_moves_nothing_but_the_scale(llama: LlamaForCausalLM) -> None:
    loop, calls = fp16_loop(llama, 2.0**60)
    before = values(loop)
    assert loop.step() is None
    assert same(values(loop), before)
    assert not loop.optimizer.state
    assert loop.state.step == loop.state.real_tokens == loop.state.target_tokens == 0
    assert loop.precision.scaler.get_scale() == 2.0**59
    assert not calls.records


def test_after_overflows_the_same_step_comes_again_and_is_counted_once(llama: LlamaForCausalLM) -> None:
    loop, calls = fp16_loop(llama, 2.0**40)
    loop.run(2)
    assert [record.step for record in calls.records] == [1, 2]
    assert calls.records[0].lr == pytest.approx(0.5e-2)
    assert loop.state.target_tokens == sum(record.target_tokens for record in calls.records)


def test_an_overflowed_step_calls_no_hook(llama: LlamaForCausalLM) -> None:
    """A hook that reads gradients (an importance score) must not meet those of a step that never was."""
    loop, calls = fp16_loop(llama, 2.0**60)
    assert loop.step() is None
    assert calls.made == []


def test_the_scalers_state_round_trips(llama: LlamaForCausalLM) -> None:
    loop, _ = fp16_loop(llama, 2.0**20)
    loop.run(1)
    other = Precision("fp16", CPU)
    other.load_state_dict(loop.precision.state_dict())
    assert other.scaler.get_scale() == loop.precision.scaler.get_scale()
    assert other.state_dict() == loop.precision.state_dict()


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_without_fp16_there_is_no_scaler_and_no_state(name: str) -> None:
    precision = Precision(name, CPU)
    assert not precision.scaler.is_enabled()
    assert precision.state_dict() == {}
    precision.load_state_dict({})
    assert not precision.may_halve()


def test_autocast_is_on_only_where_it_is_asked_for() -> None:
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with Precision(name, CPU).autocast():
            assert torch.is_autocast_enabled("cpu") == (dtype is not None)
            if dtype is not None:
                assert torch.get_autocast_dtype("cpu") == dtype


def test_auto_goes_by_capability_and_a_name_by_itself() -> None:
    assert [resolve(name, CPU) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    assert resolve("auto", CPU) == resolve("auto", CPU)
    assert resolve("auto", CPU) in ("fp32", "bf16")
    assert resolve("auto", torch.device("meta")) == "fp32"
