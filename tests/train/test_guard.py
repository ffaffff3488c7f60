"""What is not finite stops the run before it reaches a parameter."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from loops import loop_of, order_of, rows_of, same, values
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lowrank.errors import NumericsError
from lowrank.train.finite import show_rows
from lowrank.train.loop import Loop
from lowrank.train.loss import target_loss
from lowrank.train.optim import state_tensors

pytestmark = pytest.mark.usefixtures("both_ways")


def poisoned(value: float, step: int, micro_batch: int) -> Any:
    """A loss that is ``value`` on one micro-batch of one step."""
    rows = order_of().at(step)[micro_batch].rows

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = target_loss(model, batch)
        return found * value if batch.rows == rows else found

    return loss


def optimizer_state(loop: Loop) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in state_tensors(loop.optimizer)[0].items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_is_named_and_touches_nothing(
    value: float, shown: str, precision: str, llama: LlamaForCausalLM
) -> None:
    loop = loop_of(llama, loss=poisoned(value, step=2, micro_batch=1), precision=precision)
    loop.run(1)
    while loop.state.step == 0:  # fp16 may need to find its scale first
        loop.run(1)
    before, moments, rng = values(loop), optimizer_state(loop), torch.get_rng_state()
    [_, rows, _] = rows_of(loop.batches, 2)  # type: ignore[arg-type]
    with pytest.raises(NumericsError) as caught:
        loop.run(5)
    text = f"step 2: loss is {shown} in micro-batch 2 of 3 (rows {show_rows(rows)}). Parameters are those of step 1"
    assert str(caught.value).startswith(text)
    assert same(values(loop), before)
    assert same(optimizer_state(loop), moments)
    assert loop.state.step == 1
    assert all(p.grad is None for p in loop.parameters.values())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_stopped_too(
    value: float, shown: str, precision: str, gpt2: GPT2LMHeadModel
) -> None:
    loop = loop_of(gpt2, precision=precision, max_norm=0.3)
    loop.run(1)
    before, moments = values(loop), optimizer_state(loop)
    name, parameter = list(loop.parameters.items())[3]
    parameter.register_hook(lambda grad: torch.full_like(grad, value))
    [rows, *_] = rows_of(loop.batches, 2)  # type: ignore[arg-type]
    where = f"gradient of {name} is {shown} in micro-batch 1 of 3 (rows {show_rows(rows)})"
    with pytest.raises(NumericsError, match=re.escape(f"step 2: {where}. Parameters are those of step 1")):
        loop.run(5)
    assert same(values(loop), before)
    assert same(optimizer_state(loop), moments)
    assert loop.state.step == 1


def test_fp16_gradients_that_no_scale_makes_finite_stop_the_run(llama: LlamaForCausalLM) -> None:
    loop = loop_of(llama, precision="fp16")
    next(iter(loop.parameters.values())).register_hook(lambda grad: grad * math.nan)
    before = values(loop)
    with pytest.raises(NumericsError, match=r"gradient of model\..* is nan in micro-batch 1 of 3"):
        loop.run(1)
    assert same(values(loop), before)
    assert loop.state.step == 0


def test_rows_that_follow_one_another_are_shown_as_a_range() -> None:
    assert show_rows([1032, 1033, 1034, 1035]) == "1032–1035"
    assert show_rows([7]) == "7"
    assert show_rows([9, 3, 4]) == "9, 3, 4"
    assert show_rows(list(range(0, 40, 2))).endswith("30 and 4 more")
