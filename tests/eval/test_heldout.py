"""The held-out loss counts each target token once, and looking at it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from documents import texts
from torch import Tensor
from transformers import GPT2LMHeadModel

from lowrank.data.pack import Batch, pad
from lowrank.eval.heldout import held_out

DOCUMENTS = texts([3, 14, 5, 9, 2, 11, 7])


def summed(model: Any, batch: Batch) -> Tensor:
    logits = model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.positions]
    return F.cross_entropy(logits, batch.targets, reduction="sum")


def measured(model: Any, sizes: list[int]) -> dict[str, float]:
    """Over batches of so many documents."""
    edges = torch.tensor([0, *sizes]).cumsum(0).tolist()
    batches = [pad(DOCUMENTS[a:b]) for a, b in pairwise(edges)]
    return held_out(model, batches, summed, nullcontext)


@pytest.mark.parametrize("sizes", [[7], [1, 6], [1] * 7], ids=str)
def test_every_target_token_counts_once_whatever_batch_it_is_in(
    sizes: list[int], make_gpt2: Callable[..., GPT2LMHeadModel]
) -> None:
    model = make_gpt2().double().eval()
    losses = []
    for document in DOCUMENTS:
        logits = model(torch.tensor([document.tokens])).logits[0].detach()
        p = logits.log_softmax(-1)
        losses += [-p[i - 1, document.tokens[i]] for i in range(1, len(document.tokens)) if document.target[i]]
    found = measured(model, sizes)
    assert found["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-9)
    assert found["perplexity"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-9)


def test_dropout_is_off_and_nothing_of_the_model_or_torchs_generators_changes(
    make_gpt2: Callable[..., GPT2LMHeadModel],
) -> None:
    model = make_gpt2().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    found = measured(model, [3, 4])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found == measured(model.eval(), [3, 4])
