"""What a chart needs to know before anything is drawn: series, smoothing, thinning, axis ranges and ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lowrank.report.figures import number, scientific

Style = Literal["line", "thin", "dashed", "points"]
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve. A y that is not finite breaks the line and is marked by a cross on the upper edge."""

    name: str  # in the legend; empty: not there
    xs: Sequence[float]
    ys: Sequence[float]
    style: Style = "line"
    hue: int | None = None  # which of the theme's hues; None: by its place among the series

    def points(self) -> list[Point]:
        """Every point whose x is a number, whatever its y."""
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if number(x) is not None]

    def runs(self) -> list[list[Point]]:
        """The finite points, in unbroken runs."""
        runs: list[list[Point]] = [[]]
        for x, y in self.points():
            if number(y) is not None:
                runs[-1].append((x, y))
            elif runs[-1]:
                runs.append([])
        return [run for run in runs if run]

    def telling(self) -> list[float]:
        """The values that the y axis must hold: all, but the outermost hundredth of a long raw curve."""
        values = sorted(y for run in self.runs() for _, y in run)
        cut = len(values) // 200 if self.style == "thin" else 0
        return values[cut : len(values) - cut]


def drawable(ys: Sequence[float]) -> np.ndarray:
    """``number`` of each, nan where it is none."""
    values = np.asarray(ys, dtype=float)
    return np.where(np.abs(values) < 1e100, values, np.nan)


def smoothing(points: int) -> float:
    """The standard deviation, in points, that suits a curve of so many: a thirtieth, from 1 to 500."""
    return min(max(1.0, points / 30), 500.0)


def smooth(ys: Sequence[float], width: float | None = None, at: Sequence[int] | None = None) -> list[float]:
    """At each place the value of the line fitted around it, weighted by a centred Gaussian (local regression).

    No lag, and no pull at the two ends, where a mean would flatten a falling loss. Values that are not finite
    are left out. ``width`` is the standard deviation in points (default ``smoothing(len(ys))``); ``at`` are the places
    that are wanted, by default all.
    """
    if not ys:
        return []
    sigma = width or smoothing(len(ys))
    half = math.ceil(3 * sigma)
    away = np.arange(-half, half + 1, 1.0)  # (2 half + 1)
    kernel = np.exp(-0.5 * (away / sigma) ** 2)
    drawn = drawable(ys)  # (n)
    known, values = np.isfinite(drawn).astype(float), np.nan_to_num(drawn)

    def weighed(what: np.ndarray, power: int) -> np.ndarray:
        """Sum of weight × distance ** power × what around each place."""
        weights = kernel * away**power
        if at is None:
            return np.convolve(what, weights[::-1])[half : half + len(what)]  # which turns the kernel round
        return sliding_window_view(np.pad(what, half), len(weights))[np.asarray(at, dtype=int)] @ weights

    mass, lever, spread = (weighed(known, power) for power in (0, 1, 2))
    total, moment = weighed(values, 0), weighed(values, 1)
    room = mass * spread - lever**2  # 0 where there is but one point to fit
    with np.errstate(divide="ignore", invalid="ignore"):
        line, mean = (spread * total - lever * moment) / room, total / mass
    fitted = np.where(room > 1e-3 * mass * spread, line, mean)
    return np.where(mass > 1e-12, fitted, np.nan).tolist()


def telling_places(ys: Sequence[float], buckets: int = 1100, lost: int = 200) -> list[int]:
    """The places of a long curve that draw it: of each bucket its lowest and highest value, both ends, and the first
    values that are not finite. All places of one that is not longer than that."""
    if len(ys) <= 2 * buckets:
        return list(range(len(ys)))
    values = drawable(ys)  # (n)
    finite = np.flatnonzero(np.isfinite(values))
    kept = {0, len(ys) - 1, *np.flatnonzero(~np.isfinite(values))[:lost].tolist()}
    for bucket in np.array_split(finite, buckets):
        if len(bucket):
            kept |= {int(bucket[values[bucket].argmin()]), int(bucket[values[bucket].argmax()])}
    return sorted(kept)


def thinned(run: Sequence[Point], buckets: int) -> list[Point]:
    """At most two points a bucket, its lowest and its highest: a long curve keeps its every spike."""
    if len(run) <= 2 * buckets:
        return list(run)
    kept: list[Point] = [run[0]]
    for place in range(buckets):
        bucket = run[place * len(run) // buckets : (place + 1) * len(run) // buckets]
        kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return [*kept, run[-1]]


def span(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Lowest and highest with a margin (a share of their distance), never equal."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        extra = 0.1 * abs(high) or 1.0
        return low - extra, high + extra
    return low - margin * (high - low), high + margin * (high - low)


def ticks(low: float, high: float, about: float, whole: bool = False) -> list[float]:
    """Round values between ``low`` and ``high``, near ``about`` of them; integers only where ``whole``."""
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(times for times in (1, 2, 5, 10) if times * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """One label a tick, all with the same number of decimals: ``0.5``, ``2e-4``, ``15k``."""
    most = max((abs(value) for value in values), default=0.0)
    step = min((b - a for a, b in pairwise(values)), default=most or 1.0)
    if most >= 1e7 or 0 < most < 0.0099:
        return [scientific(value) if value else "0" for value in values]
    unit, scale = ("k", 1000.0) if most >= 10_000 else ("", 1.0)
    decimals = max(0, -math.floor(math.log10(step / scale) + 1e-9))
    texts = [f"{value / scale:.{decimals}f}".replace("-", "−") for value in values]
    return [text + unit if value else "0" for text, value in zip(texts, values, strict=True)]
