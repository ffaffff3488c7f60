"""Curves: the measured points of a piece, each with what was predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import gettempdir
from typing import Any

from benchmarks.pieces import Curve


@dataclass(frozen=True)
class Drawn:
    curve: Curve
    x: list[float]
    measured: list[float]  # medians
    low: list[float]
    high: list[float]
    predicted: list[float]

    @property
    def off(self) -> float:
        """The largest |measured / predicted − 1|; of a line, of its slope."""
        pairs = list(zip(self.measured, self.predicted, strict=True))
        if self.curve.prediction == "line":
            first, wanted = pairs[0]
            return max(abs((m - first) / (p - wanted) - 1) for m, p in pairs[1:])
        return max(abs(m / p - 1) for m, p in pairs)


def drawn(piece: str, found: Mapping[str, Any]) -> Drawn:
    """Raises KeyError where the piece, or a point of it, was not measured."""
    about = found[piece]
    curve = Curve(**about["curve"])
    arms = [arm for name, arm in about["arms"].items() if not name.startswith("plain")]
    values = [arm[curve.y] for arm in arms]
    x = [arm["x"] for arm in arms]
    measured = [median(each) for each in values]
    slower = attention_against_products(found)
    return Drawn(
        curve,
        x,
        measured,
        [min(each) for each in values],
        [max(each) for each in values],
        predictions(curve, x, measured[0], [arm.get("flops") for arm in arms], slower),
    )


def predictions(
    curve: Curve, x: Sequence[float], first: float, flops: Sequence[Sequence[float] | None], slower: float
) -> list[float]:
    """Through the first point: what follows is the formula's, not the stopwatch's."""
    match curve.prediction:
        case "flat":
            return [first] * len(x)
        case "line":
            return [first + curve.slope * (each - x[0]) for each in x]
    work = [products + slower * attention for products, attention in filter(None, flops)]
    if curve.y == "seconds":
        return [first * each / work[0] for each in work]
    return [first * work[0] / each for each in work]  # the same tokens a step


def attention_against_products(found: Mapping[str, Any]) -> float:
    """How many times as long attention takes for a FLOP as a product does; 1 where that was not measured."""
    arm = found.get("rates", {}).get("arms", {}).get("rates")
    return arm["products"][0] / arm["attention"][0] if arm else 1.0


def png(one: Drawn, path: Path, about: str) -> None:
    """Points with their spread, and the prediction as a line. Raises ImportError without matplotlib."""
    import os

    os.environ.setdefault("MPLCONFIGDIR", gettempdir())
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 3.2), dpi=100)
    below = [m - low for m, low in zip(one.measured, one.low, strict=True)]
    above = [high - m for m, high in zip(one.measured, one.high, strict=True)]
    axes.plot(one.x, one.predicted, color="#8a8f98", linestyle="--", label="predicted")
    axes.errorbar(one.x, one.measured, yerr=[below, above], fmt="o", color="#2f62d0", capsize=3, label="measured")
    axes.set(
        title=one.curve.title,
        xlabel=one.curve.x,
        ylabel=one.curve.label,
        ylim=(0, 1.15 * max(*one.high, *one.predicted)),
    )
    if one.curve.log:
        axes.set_xscale("log", base=2)
    axes.title.set_fontsize(10)
    axes.grid(color="#e7eaee")
    axes.legend(frameon=False)
    figure.text(0.99, 0.01, about, ha="right", fontsize=6, color="#656d76")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
