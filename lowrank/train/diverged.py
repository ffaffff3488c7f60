"""Ending a run whose loss has run away: what a learning-rate range test waits for."""

from __future__ import annotations

from typing import Any

from lowrank.train.finite import Fault
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.stopping import Stoppable

DECAY = 0.8  # of the running average, which the first steps do not bias


class Diverged(Hook):
    """Asks the loop to leave when the running average of the training loss is more than ``factor`` (None: however many)
    times its lowest, or a batch was skipped since something was not finite."""

    def __init__(self, factor: float | None, loop: Stoppable) -> None:
        self.factor, self.loop = factor, loop
        self.total = self.weight = 0.0
        self.lowest: float | None = None
        self.stopped: int | None = None  # after which step

    def after_step(self, record: StepRecord) -> None:
        self.total, self.weight = DECAY * self.total + record.loss, DECAY * self.weight + 1.0
        mean = self.total / self.weight
        self.lowest = mean if self.lowest is None else min(self.lowest, mean)
        if self.factor is not None and mean > self.factor * self.lowest:
            self.stopped, self.loop.stop = record.step, True

    def after_skip(self, fault: Fault) -> None:
        if self.factor is not None:
            self.stopped, self.loop.stop = fault.step - 1, True

    def __str__(self) -> str:
        return (
            f"diverged after step {self.stopped}: the loss was not finite, or {self.factor or 0:g} times its lowest "
            "(loop.diverged)"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "weight": self.weight, "lowest": self.lowest, "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.weight, self.lowest = state["total"], state["weight"], state["lowest"]
        if state["stopped"] is not None and self.factor is not None:
            self.stopped, self.loop.stop = state["stopped"], True
