"""How far a run is, from the end of its ``metrics.jsonl``, while it is being written."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lowrank.report.figures import mapping, number

TAIL = 1 << 18  # bytes at most at once
KEPT = 512  # points of the curve; of a longer one neighbours are averaged


class Curve:
    """Losses as they come, in ``KEPT`` points at most."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self.stride = 1  # losses that a point is the mean of
        self.pending: list[float] = []

    def add(self, loss: float) -> None:
        self.pending.append(loss)
        if len(self.pending) < self.stride:
            return
        self.points.append(sum(self.pending) / len(self.pending))
        self.pending = []
        if len(self.points) == KEPT:
            self.points = [(one + other) / 2 for one, other in zip(self.points[::2], self.points[1::2], strict=True)]
            self.stride *= 2


class Course:
    """``read`` looks at what was written since; what is torn, missing or no row at all is passed over."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, 0
        self.curve = Curve()
        self.step = 0
        self.last: int | None = None  # of all steps
        self.speed: float | None = None  # tokens/s of the newest step
        self.judged: float | None = None  # the newest held-out loss
        self.first: tuple[int, float] | None = None  # the newest step of the first look, and when that was
        self.newest = 0.0  # when the newest one was

    def read(self) -> None:
        path = self.folder / "metrics.jsonl"
        try:
            size = path.stat().st_size
            if size < self.place:  # a resumed run has taken steps back
                self.place, self.curve, self.first = 0, Curve(), None
            if size == self.place:
                return
            with path.open("rb") as file:
                start = max(self.place, size - TAIL)
                file.seek(start)
                text = file.read(TAIL)
        except OSError:
            return
        whole = text.rpartition(b"\n")[0]
        self.place = start + (len(whole) + 1 if whole else 0)
        for line in whole.split(b"\n"):
            self.take(row(line))
        self.last = self.last or self.steps()
        if self.first is None and self.step:
            self.first = self.step, self.newest

    def take(self, found: dict[str, Any]) -> None:
        if found.get("event") == "eval":
            self.judged = number(found.get("loss"))
        step = number(found.get("step"))
        if found.get("event") != "step" or step is None:
            return
        self.step, self.newest, self.speed = int(step), time.monotonic(), number(found.get("tokens_per_s"))
        loss = number(found.get("loss"))
        self.curve.add(float("nan") if loss is None else loss)

    def steps(self) -> int | None:
        """Of the whole run, as it wrote them down at its start."""
        try:
            told = json.loads((self.folder / "identity.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        steps = number(mapping(mapping(told).get("identity")).get("steps"))
        return None if steps is None else int(steps)

    def left(self) -> float | None:
        """Seconds to the last step, at the pace since the first look, evaluations and all; None where that
        is not known yet."""
        if self.first is None or self.last is None or self.step <= self.first[0]:
            return None
        pace = (self.newest - self.first[1]) / (self.step - self.first[0])
        return max(0.0, pace * (self.last - self.step) - (time.monotonic() - self.newest))


def row(line: bytes) -> dict[str, Any]:
    try:
        return mapping(json.loads(line))
    except (ValueError, RecursionError):
        return {}
