"""Stopping when the held-out loss has ceased to fall."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.stopping import Stoppable


def better(best: dict[str, Any] | None, step: int, loss: float | None) -> dict[str, Any] | None:
    """The step and the loss of the best so far, where ``step`` has this held-out loss (None: it was not evaluated)."""
    if loss is None or not math.isfinite(loss) or (best is not None and loss >= best["loss"]):
        return best
    return {"step": step, "loss": loss}


class EarlyStop(Hook):
    """Asks the loop to leave when ``patience`` evaluations in a row (None: however many) were no better than the best.

    ``held_out(step)`` is the loss that was found at a step, or None where there was no evaluation; one that is not
    finite is no better. The best of all evaluations is kept in any case.
    """

    def __init__(self, held_out: Callable[[int], float | None], patience: int | None, loop: Stoppable) -> None:
        self.held_out, self.patience, self.loop = held_out, patience, loop
        self.best: dict[str, Any] | None = None  # its step and loss
        self.since = 0  # evaluations after the best one
        self.stopped: int | None = None  # after which step

    def after_step(self, record: StepRecord) -> None:
        loss = self.held_out(record.step)
        if loss is None:
            return
        best = better(self.best, record.step, loss)
        self.since = self.since + 1 if best is self.best else 0
        self.best = best
        if self.patience is not None and self.since >= self.patience:
            self.stopped = record.step
            self.loop.stop = True

    def __str__(self) -> str:
        best = f"{self.best['loss']:.4f} at step {self.best['step']}" if self.best else "never finite"
        return (
            f"stopped early after step {self.stopped}: {self.since} evaluations without a better held-out loss "
            f"(loop.patience); the best was {best}"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "since": self.since, "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.since = state["best"], state["since"]
        if state["stopped"] is not None and self.patience is not None and self.since >= self.patience:
            self.stopped = state["stopped"]
            self.loop.stop = True
