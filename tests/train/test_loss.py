"""The loss is the sum over target tokens, whatever the layout, with the head run on their rows alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from documents import texts
from torch import Tensor, nn

from lowrank.data.pack import Batch, pack, pad
from lowrank.models import attention
from lowrank.train.loss import target_logits, target_loss

LAYOUTS: dict[str, Callable[..., Batch]] = {"packed": pack, "padded": pad}


@pytest.fixture(params=LAYOUTS)
def batch(request: pytest.FixtureRequest) -> Batch:
    return LAYOUTS[request.param](texts([6, 3, 9]))


@dataclass
class Output:
    logits: Tensor


class Bigram(nn.Module):
    """A language model without ``logits_to_keep``."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 64)

    def forward(self, input_ids: Tensor, use_cache: bool = True, **kwargs: Any) -> Output:
        return Output(self.table(input_ids))


@pytest.fixture
def packing(model: Any) -> Any:
    assert attention.install(model) is None
    return model


def whole(model: Any, batch: Batch) -> Tensor:
    """(targets, vocabulary): every logit computed, then the target rows taken."""
    logits: Tensor = model(**batch.inputs, use_cache=False).logits
    return logits.flatten(0, 1)[batch.positions]


def test_it_is_the_summed_cross_entropy_of_the_target_rows_with_its_gradients(packing: Any, batch: Batch) -> None:
    model = packing.double()
    wanted = F.cross_entropy(whole(model, batch), batch.targets, reduction="sum")
    found = target_loss(model, batch)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    weight = model.get_input_embeddings().weight
    [one], [other] = torch.autograd.grad(found, [weight]), torch.autograd.grad(wanted, [weight])
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_logits_are_those_of_the_targets_in_their_order(packing: Any, batch: Batch) -> None:
    torch.testing.assert_close(target_logits(packing, batch), whole(packing, batch), rtol=0, atol=1e-5)


def test_the_head_runs_on_the_target_rows_of_a_pack_alone(packing: Any) -> None:
    batch, seen = pack(texts([6, 3, 9])), []
    packing.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    target_loss(packing, batch)
    assert seen == [len(batch.targets)]


def test_a_model_that_computes_every_logit_loses_the_same(batch: Batch) -> None:
    model = Bigram()
    wanted = F.cross_entropy(whole(model, batch), batch.targets, reduction="sum")
    torch.testing.assert_close(target_loss(model, batch), wanted)


@pytest.mark.parametrize("held", [False, True], ids=["under autocast", "a model held in bf16"])
def test_it_is_summed_in_fp32_even_where_logits_are_bf16(held: bool, packing: Any, batch: Batch) -> None:
    model = packing.bfloat16() if held else packing
    with nullcontext() if held else torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = target_logits(model, batch), target_loss(model, batch)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), batch.targets, reduction="sum"))


def test_no_targets_lose_nothing(packing: Any, batch: Batch) -> None:
    empty = Batch(batch.inputs, batch.positions[:0], batch.targets[:0], batch.rows, batch.real_tokens)
    assert float(target_loss(packing, empty).detach()) == 0.0
