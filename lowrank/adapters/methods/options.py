"""What the options of a method may be: each check returns the value, or raises ValueError with the plan's sentence.

``ValueError("r: 0 is not allowed; a positive integer.")`` becomes ``adapter.r: 0 is not allowed; …`` for the user.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowrank.errors import did_you_mean


def shown(value: object) -> str:
    """As a user writes it."""
    return str(value).lower().replace("none", "null") if value is None or isinstance(value, bool) else repr(value)


def positive_integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: {shown(value)} is not allowed; a positive integer.")
    return value


def positive_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}: {shown(value)} is not allowed; a positive number.")
    if not 1e-37 < value < 1e37:
        raise ValueError(f"{name}: {shown(value)} is not allowed; a positive number within fp32's range.")
    return value


def probability(name: str, value: object) -> float:
    """Of dropping: 1 would drop everything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}: {shown(value)} is not allowed; a number from 0 up to, but not including, 1.")
    return float(value)


def fraction(name: str, value: object) -> float:
    """Of a run."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(
            f"{name}: {shown(value)} is not allowed; a fraction of the run, from 0 up to, but not including, 1."
        )
    return float(value)


def smoothing(name: str, value: object) -> float:
    """Of a moving average: 0 would forget everything, 1 would take nothing in."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{name}: {shown(value)} is not allowed; a number between 0 and 1.")
    return float(value)


def not_negative(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: {shown(value)} is not allowed; a number from 0.")
    return float(value)


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {shown(value)} is not allowed; true or false.")
    return value


def choice(name: str, value: object, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        hint = did_you_mean(str(value), allowed)
        raise ValueError(f"{name}: {shown(value)} is not allowed; one of {', '.join(allowed)}.{hint}")
    return value
