"""Generated texts before and after, with the words that differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowrank.report.difference import Part, compared
from lowrank.report.figures import clean


@dataclass(frozen=True)
class Sample:
    row: str
    prompt: str
    reference: str
    base: list[Part] | None  # None: the untouched base generated nothing, not even an empty text
    tuned: list[Part]


def sample(told: dict[str, Any]) -> Sample:
    row, prompt, reference, tuned = (clean(told.get(name) or "") for name in ("row", "prompt", "reference", "tuned"))
    if told.get("base") is None:
        return Sample(row, prompt, reference, None, plain(tuned))
    base = clean(told["base"])
    before, after = compared(base, tuned) or (plain(base), plain(tuned))
    return Sample(row, prompt, reference, before, after)


def plain(text: str) -> list[Part]:
    return [(False, text)] if text else []
