"""What a fused training pass does once and no oftener: masks drawn, adapters cast, weights dequantised."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.adapters.inject import named_trainable
from lowrank.adapters.methods.dropout import dropped_positions
from lowrank.adapters.sites import adapted as wrapped
from lowrank.data.pack import pack
from lowrank.fast import block
from lowrank.fast.cast import cast
from lowrank.quant.convert import quantize
from lowrank.train.loss import target_loss
from tests.documents import texts
from tests.fast.passes import BLOCKS, LENGTHS, adapted, agree, trained

BATCH = pack(texts(LENGTHS))
SITES = 7  # of a Llama block


class Operations(TorchDispatchMode):
    """Counts operations, and the most that there are at once of what one of them has made."""

    def __init__(self, watched: str = "") -> None:
        super().__init__()
        self.watched, self.counts, self.alive, self.most = watched, Counter[str](), weakref.WeakSet[Any](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        self.counts[name] += 1
        if name == self.watched:
            self.alive.add(result.untyped_storage())
            self.most = max(self.most, len(self.alive))
        return result


def test_a_mask_is_drawn_once_for_the_sites_that_share_it(llama: Any) -> None:
    """In each direction: one for what attention reads, since q, k, v and o are of one width here, one for gate and up
    and one for down, with which backward begins where forward has ended."""
    dropped_positions.cache_clear()
    model = adapted(llama, 0.2)
    block.fuse(model)
    with Operations() as forward:
        loss = target_loss(model, BATCH)
    with Operations() as backward:
        loss.backward()
    assert forward.counts["geometric_"] == 3 * BLOCKS
    assert backward.counts["geometric_"] == 3 * BLOCKS - 1


def test_nothing_of_the_activations_size_is_made_for_a_mask(llama: Any) -> None:
    """More operations than without dropout, but no more memory kept, and no product more."""
    kept, products = [], []
    for p in (0.0, 0.2):
        model = adapted(copy.deepcopy(llama), p)
        block.fuse(model)
        kept.append(trained(model, BATCH)[2])
        with Operations() as counted:
            target_loss(model, BATCH).backward()
        products.append({name: counted.counts[name] for name in ("mm", "addmm", "addmm_", "linear", "div", "clone")})
    assert kept[0] == kept[1]
    assert products[0] == products[1]


def test_a_weight_is_dequantised_once_a_pass_and_let_go_before_the_next(llama: Any) -> None:
    model = adapted(quantize(llama))
    block.fuse(model)
    with Operations("dequantize_4bit") as forward:
        loss = target_loss(model, BATCH)
    with Operations("dequantize_4bit") as backward:
        loss.backward()
    assert forward.counts["dequantize_4bit"] == SITES * BLOCKS
    lowest = 3  # q, k and v of the first block: nothing below them wants a gradient
    assert backward.counts["dequantize_4bit"] == SITES * BLOCKS - lowest
    assert forward.most == backward.most == 1


def test_adapters_are_cast_once_a_step_and_not_again_in_backward_or_the_next_micro_batch(llama: Any) -> None:
    model = adapted(llama)
    block.fuse(model)
    clock = next(module.adapter.clock for _, module in wrapped(model))
    counts = []
    for now in ((5, 0), (5, 1), (6, 0)):
        clock.set(*now)
        with torch.autocast("cpu", dtype=torch.bfloat16), Operations() as counted:
            target_loss(model, BATCH).backward()
        counts.append(counted.counts["_to_copy"])
    assert counts[0] - counts[1] == 2 * SITES * BLOCKS
    assert counts[2] == counts[0]


@pytest.mark.parametrize("case", ["in place", "past autograd", "loaded", "replaced", "copied", "no clock"])
def test_a_cast_is_never_of_values_that_were(case: str, llama: Any) -> None:
    model = adapted(llama)
    lora: Any = next(module.adapter for _, module in wrapped(model))
    first, _ = cast(lora, torch.bfloat16)
    assert cast(lora, torch.bfloat16)[0] is first
    assert cast(lora, torch.float16)[0].dtype == torch.float16
    match case:
        case "in place":
            with torch.no_grad():
                lora.A.mul_(2)
        case "past autograd":  # as an optimizer's write to a flat buffer of which A is a part: between two steps
            lora.A.data.mul_(2)
            lora.clock.set(4, 0)
        case "loaded":
            lora.load_state_dict({name: 2 * value for name, value in lora.state_dict().items()})
        case "replaced":
            lora.A.data = 2 * lora.A.data
        case "copied":
            lora = copy.deepcopy(lora)
            with torch.no_grad():
                lora.A.mul_(2)
        case "no clock":
            lora.clock.now = None
            lora.A.data.mul_(2)
    assert torch.equal(cast(lora, torch.bfloat16)[0], lora.A.detach().bfloat16())
    assert not torch.equal(lora.A.detach().bfloat16(), first)


def test_a_cast_is_no_part_of_a_state_or_of_what_trains(llama: Any) -> None:
    model = adapted(llama)
    names, parameters = list(model.state_dict()), list(named_trainable(model))
    block.fuse(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target_loss(model, BATCH).backward()
    assert list(model.state_dict()) == names
    assert list(named_trainable(model)) == parameters


def test_a_deep_copy_trains_its_own_adapters(llama: Any) -> None:
    model = adapted(llama)
    block.fuse(model)
    other = copy.deepcopy(model)
    wanted: dict[str, Tensor] = trained(model, BATCH)[1]
    with torch.no_grad():
        for parameter in named_trainable(other).values():
            parameter.zero_()
    agree(trained(model, BATCH)[1], wanted, 0.0)
    found = trained(other, BATCH)[1]
    assert all(not gradient.any() for gradient in found.values())  # at A = B = 0 each one's factor is the other
