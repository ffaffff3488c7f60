"""A learning-rate range test (Smith, arXiv 1506.01186): loss against a learning rate that grew, and what follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from lowrank.report import svg
from lowrank.report.curves import Series, smooth
from lowrank.report.figures import mapping, number, scientific

KIND = "exponential"  # of the schedule
FEWEST = 8  # steps from which a slope can be told


@dataclass(frozen=True)
class Range:
    """``rates`` and the smoothed ``losses`` at them, step by step; the suggestions are some of ``rates``."""

    rates: Sequence[float]
    raw: Sequence[float]
    losses: Sequence[float]
    steepest: float  # where the loss fell fastest over log(lr): a good peak for a schedule with a warm-up
    lowest: float  # where it was lowest: already too high

    def to_dict(self) -> dict[str, float]:
        return {"steepest": self.steepest, "lowest": self.lowest, "tenth_of_lowest": self.lowest / 10}


def range_of(rows: Sequence[Mapping[str, Any]]) -> Range | None:
    """Of the step rows of a run; None where they are too few, or the loss never fell."""
    known = [(number(row.get("lr")), number(row.get("loss"))) for row in rows if row.get("event", "step") == "step"]
    points = [(rate, loss) for rate, loss in known if rate is not None and rate > 0 and loss is not None]
    if len(points) < FEWEST:
        return None
    rates, raw = [rate for rate, _ in points], [loss for _, loss in points]
    losses = np.array(smooth(raw))  # (steps)
    slopes = np.gradient(losses, np.log10(rates))  # nats a decade
    lowest = int(losses.argmin())
    if lowest == 0:
        return None
    return Range(rates, raw, losses.tolist(), rates[int(slopes[: lowest + 1].argmin())], rates[lowest])


def line(summary: Mapping[str, Any]) -> str:
    """What a range test suggests, in words; empty of any other run."""
    told = mapping(summary.get("lr_range"))
    rates = [number(told.get(name)) for name in ("steepest", "lowest", "tenth_of_lowest")]
    if not all(rates):
        return ""
    steepest, lowest, tenth = (scientific(rate) for rate in rates if rate)
    return f"the loss fell fastest at {steepest}; lowest at {lowest}, a tenth of which is {tenth}"


def charts(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[Markup]:
    """Loss against learning rate, of a range test; none of any other run."""
    found = range_of(rows) if mapping(config.get("schedule")).get("kind") == KIND else None
    if found is None:
        return []
    xs = [math.log10(rate) for rate in found.rates]
    at = dict(zip(found.rates, found.losses, strict=True))
    marks = [
        Series(f"{name} {scientific(rate)}", [math.log10(rate)], [at[rate]], "points", hue)
        for name, rate, hue in (("falls fastest", found.steepest, 2), ("lowest", found.lowest, 5))
    ]
    series = [Series("each step", xs, found.raw, "thin", 0), Series("smoothed", xs, found.losses, "line", 0), *marks]
    title, label = "Learning-rate range test", "log₁₀ of the learning rate"
    return [Markup(svg.chart(series, title=title, x_label=label, width=346, height=330, theme=svg.PAGE))]
