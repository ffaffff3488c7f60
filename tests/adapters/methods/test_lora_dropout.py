"""LoRA's dropout: keyed by time and group, replayed in backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lora_sites import (
    IN,
    OUT,
    check_against_equation,
    lora,
    wrap,
    x_of,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from lowrank.adapters import Adapted, LoRA
from lowrank.adapters.inject import apply
from lowrank.adapters.methods.dropout import dropped_positions
from lowrank.adapters.plan import plan
from lowrank.keys import Clock


@pytest.mark.parametrize("shape", [(7, IN), (2, 5, IN)], ids=str)
def test_backward_drops_what_forward_dropped(base: nn.Module, shape: tuple[int, ...]) -> None:
    clock = Clock(4)
    clock.set(3, 1)
    wrapped = wrap(base, dropout=0.4, clock=clock).double().train()
    x = x_of(*shape)
    positions = dropped_positions(x.numel(), 0.4, clock.draw("parent:16"), torch.device("cpu"))
    kept = torch.full((x.numel(),), 1 / 0.6, dtype=torch.float64).index_fill(0, positions, 0).view(shape)
    assert 0 < int((kept == 0).sum()) < x.numel()
    check_against_equation(wrapped, x, kept)


def test_dropout_does_nothing_in_evaluation_mode(base: nn.Module) -> None:
    check_against_equation(wrap(base, dropout=0.9).double().eval(), x_of(2, 5, IN))


def test_a_clock_that_nobody_sets_draws_new_masks_each_call() -> None:
    wrapped = wrap(nn.Linear(IN, OUT), dropout=0.5).train()
    x = x_of(5, IN, dtype=torch.float32)
    assert not torch.equal(wrapped(x), wrapped(x))
    torch.manual_seed(1)
    first = wrapped(x)
    torch.manual_seed(1)
    assert torch.equal(wrapped(x), first)


def test_a_set_clock_repeats_its_masks_and_leaves_the_default_generator_alone() -> None:
    clock = Clock(1)
    wrapped = wrap(nn.Linear(IN, OUT), dropout=0.5, clock=clock).train()
    x, before = x_of(5, IN, dtype=torch.float32), torch.get_rng_state()
    clock.set(1, 0)
    first = wrapped(x)
    clock.set(1, 1)
    assert not torch.equal(wrapped(x), first)
    clock.set(1, 0)
    assert torch.equal(wrapped(x), first)
    assert torch.equal(torch.get_rng_state(), before)


def gradient_of_a(wrapped: Adapted, x: Tensor) -> Tensor:
    [found] = torch.autograd.grad(wrapped(x).sum(), [lora(wrapped).A])
    return found


def test_sites_of_one_parent_that_read_one_input_share_a_mask(llama: LlamaForCausalLM) -> None:
    clock = Clock(0)
    apply(llama, plan(llama, {"all-linear": partial(LoRA, r=1, dropout=0.5)}), clock=clock)
    clock.set(1, 0)
    first, second = llama.train().model.layers
    x = torch.eye(32)  # row i shows whether entry (i, i) was kept
    masks = {}
    for layer, attention in (("first", first.self_attn), ("second", second.self_attn)):
        for name in ("q_proj", "k_proj", "v_proj"):
            wrapped = getattr(attention, name)
            nn.init.ones_(lora(wrapped).B)
            masks[layer, name] = gradient_of_a(wrapped, x)[0] != 0  # (in,)
    assert 0 < int(masks["first", "q_proj"].sum()) < 32
    assert torch.equal(masks["first", "q_proj"], masks["first", "k_proj"])
    assert torch.equal(masks["first", "q_proj"], masks["first", "v_proj"])
    assert not torch.equal(masks["first", "q_proj"], masks["second", "q_proj"])


@pytest.mark.parametrize("time", [None, (3, 1)], ids=["a clock that nobody sets", "a set clock"])
def test_recomputing_the_forward_in_backward_draws_the_same_mask(time: tuple[int, int] | None) -> None:
    clock = Clock(2)
    if time is not None:
        clock.set(*time)
    wrapped = wrap(nn.Linear(IN, OUT), dropout=0.5, clock=clock).double().train()
    x = x_of(5, IN)
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        y = checkpoint(wrapped, x, use_reentrant=False) if recomputed else wrapped(x)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, lora(wrapped).A, lora(wrapped).B]))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
