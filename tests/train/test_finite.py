"""NaN and infinity planted everywhere that they may come from: nothing moves, and the message leads to the place."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from loops import loop_of, order_of, rows_of, same, values
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lowrank.adapters.sites import called
from lowrank.train import finite
from lowrank.train.finite import Fault, NotFinite, show_rows
from lowrank.train.hooks import Hook
from lowrank.train.loop import Loop
from lowrank.train.loss import target_loss
from lowrank.train.optim import state_tensors

pytestmark = pytest.mark.usefixtures("both_ways")

BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])


class Spoilt(torch.autograd.Function):
    """x; in backward its gradient with one entry spoilt."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad.view(-1)[0] = ctx.value
        return grad, None


class Calls(Hook):
    """What a hook may see of a step that the guard stops: nothing but that it was skipped."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.updates: list[int] = []

    def before_update(self, step: int) -> None:
        self.updates.append(step)

    def after_skip(self, fault: Fault) -> None:
        self.faults.append(fault)


def at(rows: tuple[int, ...], value: float) -> Callable[[nn.Module, Any], Tensor]:
    """A loss whose gradient alone is spoilt, on the micro-batch of these rows."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = target_loss(model, batch)
        return Spoilt.apply(found, value) if batch.rows == rows else found

    return loss


def everything(loop: Loop) -> dict[str, Tensor]:
    moments = {f"optimizer {name}": tensor.clone() for name, tensor in state_tensors(loop.optimizer)[0].items()}
    return values(loop) | moments


def stopped(loop: Loop, steps: int = 5) -> NotFinite:
    """Runs into the guard, which must leave everything as the last whole step left it."""
    at_fault: list[dict[str, Tensor]] = []

    class Keeps(Hook):
        def after_step(self, record: Any) -> None:
            at_fault[:] = [everything(loop)]

    at_fault.append(everything(loop))
    loop.hooks = [*loop.hooks, Keeps()]
    with pytest.raises(NotFinite) as caught:
        loop.run(steps)
    assert same(everything(loop), at_fault[0])
    assert all(p.grad is None for p in loop.parameters.values())
    return caught.value


@BAD
@pytest.mark.parametrize("micro_batch", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 4])
def test_a_gradient_is_traced_to_its_micro_batch_by_running_each_again(
    bad: float, micro_batch: int, step: int, gpt2: GPT2LMHeadModel
) -> None:
    rows = order_of().at(step)[micro_batch].rows
    error = stopped(loop_of(gpt2, loss=at(rows, bad), dropout=0.2, trace=True))
    assert (error.fault.step, error.fault.micro_batch, error.fault.rows) == (step, micro_batch + 1, rows)
    assert re.match(rf"step {step}: gradient of \S+\.B is (nan|inf) \(and of 15 more parameters\) in micro", str(error))
    arrived = "First not finite: the gradient that comes to the output of the model."
    assert str(error).endswith(f"(rows {show_rows(rows)}). {arrived} Parameters are those of step {step - 1}")


def test_a_nan_row_of_the_embeddings_stops_the_first_batch_that_reads_it(llama: LlamaForCausalLM) -> None:
    token = 7
    reads = [any(token in b.inputs["input_ids"] for b in order_of().at(step)) for step in (1, 2, 3)]
    first = reads.index(True) + 1
    llama.model.embed_tokens.weight.data[token] = math.nan
    error = stopped(loop_of(llama, trace=True, named=called))
    assert error.fault.step == first
    assert error.fault.module == "First not finite: the output of model.embed_tokens."
    assert "model.embed_tokens.weight, which does not train, is not finite. " in str(error)
    assert token in order_of().at(first)[(error.fault.micro_batch or 0) - 1].inputs["input_ids"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_overflow_in_a_forward_is_named_by_its_module(
    precision: str, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data *= 1e30 if precision == "fp16" else 3e38
    error = stopped(loop_of(model, precision=precision, trace=True, named=called))
    assert error.fault.step == 1
    assert error.fault.module == "First not finite: the output of model.layers.1.mlp.up_proj."


@BAD
def test_the_adapter_is_told_from_what_it_wraps(bad: float, llama: LlamaForCausalLM) -> None:
    loop = loop_of(llama, trace=True, named=called)
    adapter = llama.model.layers[1].self_attn.v_proj.adapter
    adapter.register_forward_hook(lambda module, args, output: output * bad)
    assert stopped(loop).fault.module == "First not finite: the output of model.layers.1.self_attn.v_proj.adapter."


@BAD
def test_where_the_forward_is_finite_the_first_module_of_the_backward_is_named(
    bad: float, llama: LlamaForCausalLM
) -> None:
    inner = llama.model.layers[0].mlp.act_fn
    inner.register_forward_hook(lambda module, args, output: Spoilt.apply(output, bad))
    error = stopped(loop_of(llama, trace=True, named=called))
    assert error.fault.module == "First not finite: the gradient that model.layers.0.mlp.act_fn passes back."
    assert error.fault.micro_batch == 1


def test_tracing_changes_neither_gradients_nor_the_model(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    plain, traced = (loop_of(make_llama(), dropout=0.3, max_skipped=1) for _ in range(2))
    traced.trace, traced.named = True, called
    for loop in (plain, traced):
        loop.loss = at(order_of().at(2)[1].rows, math.nan)
        loop.run(4)
    assert same(everything(plain), everything(traced))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in traced.model.modules())


@BAD
def test_a_penalty_is_guarded_like_a_loss(bad: float, llama: LlamaForCausalLM) -> None:
    calls: list[int] = []

    def penalty() -> Tensor:
        calls.append(1)
        return next(iter(loop.parameters.values())).sum() * (bad if len(calls) == 3 else 1e-3)

    loop = loop_of(llama, penalty=penalty)
    error = stopped(loop)
    assert re.match(r"step 3: penalty is (nan|-?inf) \(rows ", str(error))
    assert (error.fault.micro_batch, len(error.fault.rows)) == (None, 6)


@BAD
def test_a_penaltys_gradient_is_no_micro_batchs(bad: float, llama: LlamaForCausalLM) -> None:
    loop = loop_of(llama, penalty=lambda: Spoilt.apply(next(iter(loop.parameters.values())), bad).sum())
    error = stopped(loop)
    name = next(iter(loop.parameters))
    assert re.match(rf"step 1: gradient of {re.escape(name)} is (nan|inf); that of no micro-batch is", str(error))


def test_finite_gradients_whose_squares_overflow_are_stopped_too(llama: LlamaForCausalLM) -> None:
    loop = loop_of(llama, loss=lambda model, batch: target_loss(model, batch) * 1e25)
    assert str(stopped(loop)).startswith("step 1: gradient norm is inf (each entry is finite")


@pytest.mark.parametrize("lr", [math.inf, math.nan])
def test_an_update_that_spoils_a_parameter_is_found_before_anything_sees_it(lr: float, llama: LlamaForCausalLM) -> None:
    calls = Calls()
    loop = loop_of(llama, schedule=lambda step: 1.0 if step < 3 else lr, max_skipped=9, hooks=[calls])
    with pytest.raises(NotFinite) as caught:
        loop.run(5)
    assert str(caught.value).startswith("step 3: parameters are not finite after the update at learning rate ")
    assert re.search(r"\)\. model\.\S+ is (nan|inf)$", str(caught.value))
    assert loop.state.step == 2
    assert calls.faults == []  # skipping would help nobody


def test_what_trains_and_was_not_finite_to_begin_with_is_said_to_have_been(llama: LlamaForCausalLM) -> None:
    loop = loop_of(llama, max_skipped=9)
    name, parameter = list(loop.parameters.items())[2]
    parameter.data[0, 0] = math.nan
    with pytest.raises(NotFinite, match=rf"\. {re.escape(name)} is nan since before the first step$"):
        loop.run(5)


def test_a_methods_own_hook_need_not_know_of_skips(llama: LlamaForCausalLM) -> None:
    class Method:
        def before_update(self, step: int) -> None: ...
        def after_update(self, step: int) -> None: ...
        def after_step(self, record: Any) -> None: ...

    loop = loop_of(llama, loss=at(order_of().at(1)[0].rows, math.nan), max_skipped=1, hooks=[Method()])
    loop.run(1)
    assert loop.state.skipped == 1


def test_skipping_takes_the_next_batch_for_the_same_step(make_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    """A run without the batch is the oracle: the same steps on all the other batches."""
    rows = order_of().at(2)[1].rows
    calls = Calls()
    skipping = loop_of(make_gpt2(), loss=at(rows, math.nan), max_skipped=1, hooks=[calls])
    skipping.run(4)

    class Without:
        def at(self, step: int) -> Any:
            return order_of().at(step if step < 2 else step + 1)

    oracle = loop_of(make_gpt2())
    oracle.batches = Without()
    oracle.run(4)
    assert same(everything(skipping), everything(oracle))
    state = skipping.state
    assert (state.step, state.position, state.skipped, state.skipped_in_row) == (4, 5, 1, 0)
    assert calls.updates == [1, 2, 3, 4]
    [told] = [fault.to_dict() for fault in calls.faults]
    assert told["what"].startswith("gradient of ")
    assert (told["event"], told["step"], told["micro_batch"], told["rows"]) == ("skipped", 2, 2, rows)
    assert len(rows_of(order_of(), 2)) == 3


class Numbered:
    """Whose micro-batches have, as their rows, the position they stand at."""

    def at(self, position: int) -> Any:
        return [replace(batch, rows=(position,)) for batch in order_of().at(position)]


@pytest.mark.parametrize(("allowed", "reached", "position"), [(0, 1, 1), (1, 2, 4), (2, 4, 9)])
def test_so_many_in_a_row_are_skipped_and_one_more_stops(
    allowed: int, reached: int, position: int, llama: LlamaForCausalLM
) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return target_loss(model, batch) * (math.nan if batch.rows[0] in (2, 4, 5, 8, 9, 10) else 1.0)

    loop = loop_of(llama, loss=loss, max_skipped=allowed)
    loop.batches = Numbered()
    error = stopped(loop, 10)
    assert (loop.state.step, loop.state.position, loop.state.skipped) == (reached, position, position - reached)
    often = f"It is batch {allowed + 1} in a row (loop.max_skipped). " if allowed else ""
    assert str(error).endswith(f"). {often}Parameters are those of step {reached}")


def test_a_skipped_batch_leaves_fp16s_scale_as_it_was(llama: LlamaForCausalLM) -> None:
    """Its scaler halves and halves before the guard knows that no scale would do."""
    rows = order_of().at(3)[0].rows
    loop = loop_of(llama, precision="fp16", loss=at(rows, math.nan), max_skipped=1)
    scales: list[float] = []

    class Scales(Hook):
        def after_step(self, record: Any) -> None:
            scales.append(loop.precision.scaler.get_scale())

    loop.hooks = [Scales()]
    loop.run(4)
    assert loop.state.skipped == 1
    assert scales[2] == scales[1] > 1


def test_counts_and_order_of_the_data_go_on_through_a_skip(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    rows = order_of().at(2)[0].rows
    loops = [loop_of(make_llama(), loss=at(rows, bad), max_skipped=1) for bad in (math.nan, 1.0)]
    for loop, steps in zip(loops, (2, 3), strict=True):
        loop.run(steps)
    assert loops[0].state.position == loops[1].state.position == 3
    assert loops[0].state.data_order == loops[1].state.data_order != ""
    loops[0].run(3)
    assert loops[0].state.data_order != loops[1].state.data_order


def test_what_is_not_finite_has_a_name() -> None:
    assert [finite.kind(v) for v in (1.0, math.nan, -math.inf)] == ["", "nan", "inf"]
    assert finite.kind(torch.tensor([1.0, math.inf, math.nan])) == "nan"
    assert finite.kind(torch.tensor([1.0, -math.inf])) == "inf"
    assert finite.kind(torch.tensor([2**40])) == ""
