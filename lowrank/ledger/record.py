"""``ledger.json``: what was predicted of a run, beside what it took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.fast import heap
from lowrank.ledger.ledger import Ledger, in_mb
from lowrank.ledger.resident import by_part, memory_of
from lowrank.record import directory
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.loop import Loop

Loss = Callable[[nn.Module, Any], Tensor]


class Record(Hook):
    """The file of one run. What an earlier process of the run has measured stays until this one has: of the peaks the
    larger one."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.path, self.device = folder / directory.LEDGER, device
        self.predicted: dict[str, Any] | None = None
        self.loop: Loop | None = None
        self.parts: dict[str, int] = {}
        self.tokens = 0  # of the largest micro-batch so far

    def begin(self, ledger: Ledger | None, loop: Loop, together: int = 1) -> None:
        """``together``: of so many runs, all of them in one pass, the prediction is, and what will be measured."""
        self.loop = loop
        self.predicted = None if ledger is None else ledger.to_dict()
        told = directory.read_json(self.path)
        told = {name: value for name, value in told.items() if name != "together"}
        shared = {"together": together} if together > 1 else {}
        directory.write_json(self.path, {**told, **shared, "predicted": self.predicted})

    @property
    def peak_mb(self) -> float | None:
        """Predicted."""
        return None if self.predicted is None else self.predicted["peak_mb"]

    def watching(self, loss: Loss) -> Loss:
        """``loss``, beside which is found out what the largest micro-batch keeps for backward."""

        def watched(model: nn.Module, batch: Any) -> Tensor:
            if batch.real_tokens <= self.tokens or not torch.is_grad_enabled():
                return loss(model, batch)
            before = in_use(self.device)
            value = loss(model, batch)
            after = in_use(self.device)
            if before is not None and after is not None:
                self.tokens, self.parts["activations"] = batch.real_tokens, after - before
            return value

        return watched

    def after_step(self, record: StepRecord) -> None:
        """After the first one gradients and the optimizer's state are there."""
        if self.loop is not None and "weights" not in self.parts:
            self.parts |= by_part(self.loop.model)
            self.parts["gradients"] = memory_of(p.grad for p in self.loop.parameters.values())
            states = self.loop.optimizer.state.values()
            self.parts["optimizer"] = memory_of(value for state in states for value in state.values())

    def finish(self, peak: float) -> None:
        """``peak``: of this process, in MB."""
        told = directory.read_json(self.path)
        before = told.get("measured")
        if isinstance(before, dict) and isinstance(before.get("peak_mb"), (int, float)):
            peak = max(peak, before["peak_mb"])
        measured = {"peak_mb": peak, "parts_mb": in_mb(self.parts), "largest_micro_batch": self.tokens}
        directory.write_json(self.path, {**told, "predicted": self.predicted, "measured": measured})


def in_use(device: torch.device) -> int | None:
    """Bytes that the allocator has given out: on a CPU, where the C library tells."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else heap.in_use()
