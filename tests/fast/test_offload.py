"""Offload: between forward and backward the inputs of all blocks but the last are elsewhere; nothing else changes."""

from __future__ import annotations

import copy
import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SMALL
from test_recompute import LENGTHS, METHODS, adapted, differing, gradients
from torch import Tensor

import lowrank
from lowrank.data.pack import pack
from lowrank.errors import ConfigError
from lowrank.fast.offload import Away, Offload
from lowrank.fast.recompute import recompute
from lowrank.testing.bases import build_llama
from lowrank.train.loss import target_loss
from tests.documents import texts

BLOCKS = 4


class Watched(Offload):
    """What leaves and what comes, in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left: list[int] = []
        self.begun: list[int] = []
        self.asked: list[int] = []

    def leave(self, block: int, x: Tensor) -> Tensor | Away:
        kept = super().leave(block, x)
        self.left += [block] if isinstance(kept, Away) else []
        return kept

    def come(self, kept: Tensor | Away) -> Tensor:
        self.asked += [kept.block] if isinstance(kept, Away) else []
        return super().come(kept)

    def fetch(self, kept: Away) -> None:
        self.begun += [kept.block] if kept.back is None else []
        super().fetch(kept)


def away(small: int = 0, **options: Any) -> tuple[Any, Watched]:
    model = adapted(build_llama(num_hidden_layers=BLOCKS), METHODS["lora"])
    offload = Watched(torch.device("cpu"), small, **options)
    assert recompute(model, "block", offload) == f"recomputation: {BLOCKS}/{BLOCKS} blocks whole, inputs on the host"
    return model, offload


def test_gradients_stay_to_the_bit_and_each_input_is_fetched_one_block_ahead() -> None:
    model, offload = away()
    batch = pack(texts(LENGTHS))
    found = gradients(model, batch)
    assert offload.left == [0, 1, 2]  # not the last one's
    assert offload.asked == offload.begun == [2, 1, 0]
    wanted = gradients(adapted(build_llama(num_hidden_layers=BLOCKS), METHODS["lora"]), batch)
    assert differing(found, wanted) == []


def test_the_one_before_is_on_its_way_while_a_block_is_in_its_backward() -> None:
    offload = Watched(torch.device("cpu"), small=0)
    offload.begin(3)
    x = [torch.randn(4, 2) for _ in range(3)]
    kept = [offload.leave(number, one) for number, one in enumerate(x)]
    first, second, third = kept
    assert third is x[2]
    assert isinstance(first, Away)
    assert isinstance(second, Away)
    assert torch.equal(offload.come(second), x[1])
    assert first.back is not None
    assert second.back is None  # given away, not held
    assert torch.equal(offload.come(first), x[0])
    assert offload.begun == [1, 0]


def test_small_inputs_stay() -> None:
    model, offload = away(small=1 << 20)
    gradients(model, pack(texts(LENGTHS)))
    assert offload.left == []


def test_nothing_is_held_after_backward_nor_of_a_forward_without_one() -> None:
    model, offload = away()
    gradients(model, pack(texts(LENGTHS)))
    target_loss(model, pack(texts(LENGTHS)))
    gc.collect()
    assert len(offload.away) == 0
    gradients(copy.deepcopy(model), pack(texts(LENGTHS)))  # a copy computes by itself


def test_offload_is_for_cuda_alone(rows: Path, tmp_path: Path) -> None:
    overrides = [f"data.path={rows}", *SMALL, "model=tiny_llama", "loop.gradient_checkpointing=block"]
    with pytest.raises(ConfigError) as refused:
        lowrank.train([*overrides, "loop.offload=true"], tmp_path / "run")
    assert str(refused.value) == "loop.offload: true is not allowed on cpu; false, or loop.device=cuda."


@pytest.mark.cuda
def test_on_cuda_inputs_leave_the_device_and_gradients_stay() -> None:
    device = torch.device("cuda")
    make = partial(build_llama, num_hidden_layers=BLOCKS, hidden_size=512, max_position_embeddings=4096)
    batch = pack(texts((700, 1300))).to(device)
    passes = []
    for offload in (None, Offload(device)):
        model = adapted(make(), METHODS["lora"]).to(device)
        recompute(model, "block", offload)
        gradients(model, batch)  # what is allocated once is
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = target_loss(model, batch)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        del loss
        passes.append((gradients(model, batch), held))
    (plain, whole), (found, less) = passes
    x = sum((700, 1300)) * 512 * 4
    assert whole - less >= (BLOCKS - 1) * x * 0.9
    for name, gradient in plain.items():  # flash attention's sums are in no fixed order
        assert float((found[name] - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max()), name
