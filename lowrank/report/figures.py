"""Numbers as a reader meets them, the same on the page and in the terminal, and the before/after comparison.

A value that is missing, not a number or not finite is an en dash everywhere: no page fails on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MISSING = "–"
# C0 and C1 controls but tab and newline, lone surrogates, and the marks that reorder text on a screen.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Measure:
    key: str  # in summary.json
    label: str
    digits: int
    relative: bool  # lower is better, and the change is worth a percentage


MEASURES = (
    Measure("loss", "held-out loss", 3, True),
    Measure("perplexity", "perplexity", 2, True),
    Measure("rouge1", "ROUGE-1", 2, False),
    Measure("rouge2", "ROUGE-2", 2, False),
    Measure("rougeL", "ROUGE-L", 2, False),
    Measure("bleu", "BLEU", 2, False),
    Measure("chrf", "chrF", 2, False),
)


@dataclass(frozen=True)
class Change:
    """One line of the before/after table, ready to print."""

    label: str
    before: str
    after: str
    change: str
    better: bool | None  # None: unknown, or no change


def clean(text: object) -> str:
    """``text`` without what a terminal would obey, XML forbids or UTF-8 cannot hold (each becomes ``\\ufffd``)."""
    return _UNPRINTABLE.sub("\ufffd", str(text).replace("\r\n", "\n"))


def mapping(value: object) -> dict[str, Any]:
    """``value`` where it is a mapping, else an empty one: a torn file can hold anything."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def number(value: object) -> float | None:
    """``value`` as a float where it is a finite number that can be drawn, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -1e100 < value < 1e100 else None  # false for nan too


def fixed(value: object, digits: int = 0) -> str:
    """``1,234.50``, with a real minus sign."""
    found = number(value)
    return MISSING if found is None else f"{found:,.{digits}f}".replace("-", "−")


def signed(value: object, digits: int = 2) -> str:
    """``+1.50`` or ``−1.50``."""
    found = number(value)
    if found is None:
        return MISSING
    return ("+" if found >= 0 else "") + fixed(found, digits)


def percent(part: object, whole: object, digits: int = 1) -> str:
    """``part`` in per cent of ``whole``, without a sign of its own: ``3.5 %``."""
    above, below = number(part), number(whole)
    return MISSING if above is None or not below else f"{fixed(100 * above / below, digits)} %"


def short(value: object) -> str:
    """Four digits that matter, for a point of a curve: ``3.081``, ``2e-4``, ``12,345``, ``nan``."""
    found = number(value)
    if found is None:
        return str(value)
    if found and abs(found) < 0.01:
        return scientific(found)
    return fixed(found) if abs(found) >= 1000 else f"{found:.4g}".replace("-", "−")


def scientific(value: float) -> str:
    """``2e-4`` rather than ``2.000e-04``."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: object) -> str:
    """``42.1 s``, ``3 min 24 s``, ``2 h 05 min``."""
    found = number(seconds)
    if found is None:
        return MISSING
    if found < 59.95:
        return f"{found:.1f} s"
    whole = round(found)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def megabytes(value: object) -> str:
    """``2,134 MB``; from ten thousand on, ``12.3 GB``."""
    found = number(value)
    if found is None:
        return MISSING
    return f"{fixed(found / 1000, 1)} GB" if found >= 10_000 else f"{fixed(found)} MB"


def evaluation(summary: Mapping[str, Any], when: str) -> dict[str, Any]:
    """``summary["eval"]["before"]`` or ``["after"]``, empty where the run has none."""
    return mapping(mapping(summary.get("eval")).get(when))


def changes(summary: Mapping[str, Any]) -> list[Change]:
    """Before against after for every measure that either has, in the order of ``MEASURES``."""
    before, after = evaluation(summary, "before"), evaluation(summary, "after")
    return [
        _change(measure, before.get(measure.key), after.get(measure.key))
        for measure in MEASURES
        if measure.key in before or measure.key in after
    ]


def _change(measure: Measure, before: object, after: object) -> Change:
    texts = (measure.label, fixed(before, measure.digits), fixed(after, measure.digits))
    old, new = number(before), number(after)
    if old is None or new is None:
        return Change(*texts, MISSING, None)
    difference = new - old
    text = signed(difference, measure.digits)
    if measure.relative and old > 0:
        text = f"{text} ({signed(100 * difference / old, 1)} %)"
    better = None if math.isclose(old, new) else (difference < 0) == measure.relative
    return Change(*texts, text, better)


def gain(summary: Mapping[str, Any]) -> tuple[str, str] | None:
    """ROUGE-L's gain and its bootstrap interval, (``+8.31``, ``6.02 to 10.55``), or None."""
    found = mapping(evaluation(summary, "after").get("rougeL_gain"))
    if number(found.get("mean")) is None:
        return None
    return signed(found["mean"]), f"{signed(found.get('low'))} to {signed(found.get('high'))}"
