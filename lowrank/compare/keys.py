"""Configuration keys and figures under dotted names, and their values as one would write them on the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lowrank.report.figures import number

ABSENT = ""  # what stands for a key that a run has not; null is `null`


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"adapter": {"r": 8}}`` → ``{"adapter.r": 8}``. A list is a value; so is a mapping whose keys are no names,
    such as patterns of sites."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and all(isinstance(k, str) and k.isidentifier() for k in value):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def looked_up(tree: Mapping[str, Any], name: str) -> Any:
    """What a dotted name leads to; None where it leads nowhere."""
    found: Any = tree
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def measured(tree: Mapping[str, Any], name: str) -> float | None:
    """The finite number under a dotted name, else None."""
    return number(looked_up(tree, name))


def numbers(tree: Mapping[str, Any]) -> list[str]:
    """The dotted names of all finite numbers in it."""
    return [name for name, value in flat(tree).items() if number(value) is not None]


def written(value: Any) -> str:
    """``true``, ``null``, ``0.0005``, ``[q_proj,v_proj]``, ``{*.q_proj: {r: 8}}``."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float():
            return plain(value)
        case Mapping():
            return "{" + ", ".join(f"{key}: {written(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(written(item) for item in value) + "]"
        case _:
            return str(value)


def plain(value: float) -> str:
    """The shortest digits that read back as this number: ``0.0005``, ``1e-05``, ``16``."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return repr(value)


def natural(text: str) -> list[tuple[int, float, str]]:
    """A sorting key by which ``r=8`` comes before ``r=16``, and digits before letters."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", text)
    return [(0, float(part), "") if place % 2 else (1, 0.0, part) for place, part in enumerate(parts) if part]


def ordered(values: Iterable[Any]) -> list[Any]:
    """Distinct values: numbers by size, then the rest as texts; false before true; a missing one last."""
    distinct = {written(value): value for value in values}

    def place(text: str) -> tuple[int, float, list[tuple[int, float, str]]]:
        found = number(distinct[text])
        return (0, found, []) if found is not None else (1 + (text == ABSENT), 0.0, natural(text))

    return [distinct[text] for text in sorted(distinct, key=place)]
