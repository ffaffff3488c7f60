"""Held-out loss: the mean −log p of every target token, each counting once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowrank.eval.mode import evaluating


class Batch(Protocol):
    @property
    def targets(self) -> Tensor: ...
    def to(self, device: torch.device) -> Any: ...


def held_out(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Any], Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """``{"loss", "perplexity"}`` over all batches; ``loss`` gives a batch's sum. Modes and generators are untouched."""
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model), autocast():
        for batch in batches:
            total += float(loss(model, batch.to(device)))
            tokens += len(batch.targets)
    mean = total / tokens
    return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}
