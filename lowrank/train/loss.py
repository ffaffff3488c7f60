"""Cross-entropy on target tokens, with the head run on their rows alone."""

from __future__ import annotations

import inspect
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TargetBatch(Protocol):
    """What a loss reads of a batch (see ``lowrank.data.pack.Batch``)."""

    @property
    def inputs(self) -> dict[str, Tensor]: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...


def target_loss(model: nn.Module, batch: TargetBatch) -> Tensor:
    """The summed −log p of the batch's target tokens, a scalar in fp32 (fp64 for an fp64 model).

    The model is asked for the logits of the target rows only (``logits_to_keep``): of an instruction data set's
    tokens, one in eight is a target, and the head of a small model is a fifth of its work.
    """
    logits = target_logits(model, batch)  # (targets, vocabulary)
    return F.cross_entropy(wide(logits), batch.targets, reduction="sum")


def target_losses(model: nn.Module, batch: TargetBatch) -> Tensor:
    """The same of each target token, not summed: (targets,)."""
    logits = target_logits(model, batch)  # (targets, vocabulary)
    return F.cross_entropy(wide(logits), batch.targets, reduction="none")


def wide(logits: Tensor) -> Tensor:
    """In fp32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def target_logits(model: nn.Module, batch: TargetBatch) -> Tensor:
    rows, width = batch.inputs["input_ids"].shape
    if not keeps_logits(model):
        logits = model(**batch.inputs, use_cache=False).logits  # (rows, width, vocabulary)
        return logits.flatten(0, 1)[batch.positions]
    # logits_to_keep names columns of the (rows, width) grid; a pack has one row, so there it names exactly the targets
    if rows == 1:
        return model(**batch.inputs, use_cache=False, logits_to_keep=batch.positions).logits[0]
    columns, at = torch.unique(batch.positions % width, return_inverse=True)
    logits = model(**batch.inputs, use_cache=False, logits_to_keep=columns).logits  # (rows, columns, vocabulary)
    return logits[batch.positions // width, at]


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model takes ``logits_to_keep``."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
