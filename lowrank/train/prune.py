"""Stopping a job of a sweep that is worse than the sweep's other jobs were at the same step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from lowrank.train.early import better
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.stopping import Stoppable


class Prune(Hook):
    """Asks the loop to leave at an evaluation where the best held-out loss so far lies above the median of what the
    other jobs' best was at that step, of which there must be ``fewest`` (None: nothing is ever pruned).

    The median stopping rule (Vizier: Golovin et al., KDD 2017, section 3.2.2). ``held_out(step)`` is the loss that was
    found at a step, or None where there was no evaluation; ``others(step)`` the best of each other job up to there.
    """

    def __init__(
        self,
        held_out: Callable[[int], float | None],
        others: Callable[[int], Sequence[float]],
        fewest: int | None,
        loop: Stoppable,
    ) -> None:
        self.held_out, self.others, self.fewest, self.loop = held_out, others, fewest, loop
        self.best: dict[str, Any] | None = None  # its step and loss
        self.found: dict[str, Any] | None = None  # what pruned this run

    def after_step(self, record: StepRecord) -> None:
        loss = self.held_out(record.step)
        if self.fewest is None or loss is None:
            return
        self.best = better(self.best, record.step, loss)
        others = self.others(record.step)
        if len(others) < self.fewest:
            return
        best, median = self.best["loss"] if self.best else math.inf, statistics.median(others)
        if best > median:
            self.found = {
                "step": record.step,
                "best": best if self.best else None,
                "median": median,
                "jobs": len(others),
            }
            self.loop.stop = True

    @property
    def stopped(self) -> int | None:
        """After which step."""
        return self.found["step"] if self.found else None

    def __str__(self) -> str:
        found = self.found or {}
        best = "never finite" if found.get("best") is None else f"{found['best']:.4f}"
        return (
            f"pruned after step {self.stopped}: the best held-out loss was {best}, above {found.get('median', 0):.4f}, "
            f"the median of {found.get('jobs', 0)} other jobs at that step (loop.prune)"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "found": self.found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
        if state["found"] is not None and self.fewest is not None:
            self.found = state["found"]
            self.loop.stop = True
