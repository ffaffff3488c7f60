"""AdaLoRA in a fused block, where it is a LoRA of diag(E) A and B: the plain path's numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from lowrank.adapters import AdaLoRA
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import plan
from lowrank.data.pack import pack
from lowrank.fast import block
from lowrank.keys import Clock, key
from lowrank.models import attention
from tests.documents import texts
from tests.fast.passes import LENGTHS, agree, trained

BATCH = pack(texts(LENGTHS))


def adapted(model: Any, p: float) -> Any:
    """With values away from the start, E too: some of it zero, as where a triplet has lost its place."""
    model.requires_grad_(False)
    assert attention.install(model) is None
    clock = Clock(0)
    apply(model, plan(model, {"all-linear": partial(AdaLoRA, init_r=4, target_r=2, dropout=p)}), clock=clock)
    dtype = next(model.parameters()).dtype
    for path, parameter in named_trainable(model).items():
        parameter.data = torch.randn(parameter.shape, generator=key(1, path)).mul_(0.1).to(dtype)
        if path.endswith(".E"):
            parameter.data[1] = 0.0
    clock.set(3, 0)
    return model.train()


@pytest.mark.parametrize("p", [0.0, 0.2], ids=["", "dropout"])
def test_loss_and_gradients_are_the_plain_ones_in_fp64(p: float, llama64: Any) -> None:
    model = adapted(llama64, p)
    loss, wanted, _ = trained(model, BATCH)
    assert block.fuse(model) == "2/2 blocks"
    fused, found, _ = trained(model, BATCH)
    assert float(fused) == pytest.approx(float(loss), rel=1e-6)  # the plain norm has its statistics in fp32
    assert {name.rpartition(".")[2] for name in wanted} == {"A", "B", "E"}
    agree(found, wanted, 2e-6)


def test_a_pruned_triplet_may_win_its_place_back(llama64: Any) -> None:
    """E of 0 leaves A without a gradient, as its equation says, and has one itself."""
    model = adapted(llama64, 0.0)
    block.fuse(model)
    _, found, _ = trained(model, BATCH)
    for name, gradient in found.items():
        if name.endswith(".A"):
            assert not gradient[1].any(), name
        if name.endswith(".E"):
            assert gradient[1] != 0, name
