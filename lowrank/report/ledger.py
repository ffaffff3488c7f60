"""Memory by part as ``ledger.json`` tells it: predicted beside measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank.report import figures

PARTS = 30  # of them at most on a page


@dataclass(frozen=True)
class Line:
    part: str
    predicted: str
    measured: str
    off: str  # by how much the prediction is
    shares: tuple[float, float] = (0.0, 0.0)  # of the largest figure, per cent: predicted and measured


def lines(told: Mapping[str, Any]) -> list[Line]:
    """The parts in the prediction's order, those that only a measurement has behind them, and last the peak. A part
    that takes less than a hundred kilobytes in both is left out."""
    predicted, measured = figures.mapping(told.get("predicted")), figures.mapping(told.get("measured"))
    first, second = (figures.mapping(one.get("parts_mb")) for one in (predicted, measured))
    names = [name for name in dict.fromkeys([*first, *second]) if any(large(one.get(name)) for one in (first, second))]
    rows = [(name, first.get(name), second.get(name)) for name in names[:PARTS]]
    rows += [("peak", predicted.get("peak_mb"), measured.get("peak_mb"))] if predicted or measured else []
    most = max((abs(figures.number(size) or 0.0) for _, *sizes in rows for size in sizes), default=0.0)
    return [line(*row, most=most) for row in rows]


def large(size: object) -> bool:
    return abs(figures.number(size) or 0.0) >= 0.1


def line(part: object, predicted: object, measured: object, most: float = 0.0) -> Line:
    one, other = figures.number(predicted), figures.number(measured)
    off = f"{(one / other - 1) * 100:+.1f} %".replace("-", "−") if one is not None and other else ""
    shares = tuple(max(0.0, 100 * (size or 0.0) / most) if most else 0.0 for size in (one, other))
    return Line(figures.clean(part), megabytes(one), megabytes(other), off, (shares[0], shares[1]))


def megabytes(size: float | None) -> str:
    return "" if size is None else figures.fixed(size, 1)


def expected(summary: Mapping[str, Any]) -> str:
    """``predicted 530``, or nothing."""
    predicted = figures.number(summary.get("predicted_peak_memory_mb"))
    return "" if predicted is None else f"predicted {figures.megabytes(predicted).removesuffix(' MB')}"


def peak(summary: Mapping[str, Any]) -> str:
    """``522 MB (predicted 530)``"""
    measured, said = figures.megabytes(summary.get("peak_memory_mb")), expected(summary)
    return f"{measured} ({said})" if said else measured
