"""How far the loss on held-out examples lies above the loss on those trained on: what more steps only memorise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank.report.curves import smooth, telling_places
from lowrank.report.figures import evaluation, fixed, mapping, number
from lowrank.report.recorded import Recorded

LEAST = 3  # points that make a curve
WORSE = 0.01  # of the lowest held-out loss: a rise that is told


@dataclass(frozen=True)
class Gap:
    """Of each step that was evaluated: the held-out loss, and the smoothed training loss there. The untouched base has
    no training loss, and no place here."""

    steps: list[float]
    held_out: list[float]
    training: list[float]

    @property
    def values(self) -> list[float]:
        return [one - other for one, other in zip(self.held_out, self.training, strict=True)]

    @property
    def is_curve(self) -> bool:
        return len(self.steps) >= LEAST

    def __str__(self) -> str:
        """The gap at the last evaluation, and whether the held-out loss has turned."""
        last, loss, gap = self.steps[-1], self.held_out[-1], self.values[-1]
        side = "above" if gap >= 0 else "below"
        said = f"At step {fixed(last)} the held-out loss lies {fixed(abs(gap), 3)} {side} the smoothed training loss."
        lowest = min(self.held_out)
        best = self.steps[self.held_out.index(lowest)]
        if loss - lowest > WORSE * lowest:
            since = (
                f"It was lowest, {fixed(lowest, 3)}, at step {fixed(best)}, and has risen by {fixed(loss - lowest, 3)}"
            )
            return f"{said} {since} since: the steps after that overfit."
        return f"{said} The held-out loss was lowest at the end." if best == last and len(self.steps) > 1 else said


def gap_of(run: Recorded) -> Gap | None:
    """None where a loss of the two is not known."""
    steps, training = _smoothed(run)
    held_out = {step: loss for step, loss in _held_out(run).items() if step > 0}
    if not held_out or len(steps) < LEAST:
        return None
    at = sorted(held_out)
    return Gap(at, [held_out[step] for step in at], np.interp(at, steps, training).tolist())


def _smoothed(run: Recorded) -> tuple[list[float], list[float]]:
    steps, losses = run.column("loss")
    places = telling_places(losses)
    pairs = [(steps[n], y) for n, y in zip(places, smooth(losses, at=places), strict=True) if number(y) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _held_out(run: Recorded) -> dict[float, float]:
    """Step → loss, of every evaluation whose loss is finite; the last may be in the summary alone."""
    after = evaluation(run.summary, "after")
    end = {"step": number(after.get("step", run.summary.get("steps"))), "loss": after.get("loss")}
    rows = [end, *run.evals] if end["step"] is not None else run.evals
    return {row["step"]: loss for row in map(mapping, rows) if (loss := number(row.get("loss"))) is not None}
