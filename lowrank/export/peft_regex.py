"""Which regular expressions of others are tried on a model's paths: those that cannot take for ever.

Python's matcher tries every way to divide a text among the parts that may be of several lengths. One such part within
another ((a+)+) makes that exponential in the text, several in a row polynomial; both are bounded here.
"""

from __future__ import annotations

import re
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)


class Choices(NamedTuple):
    """What a matcher has to choose along one way through an expression."""

    lengths: int = 0  # parts of any length: .*
    optional: int = 0  # parts that may be left out: (…)?

    def __add__(self, other: Any) -> Choices:
        return Choices(self.lengths + other.lengths, self.optional + other.optional)


MOST = Choices(5, 12)  # on paths of some sixty characters


def is_regex(text: str) -> bool:
    """Whether ``text`` is a regular expression that is quickly tried."""
    try:
        found = choices(parser.parse(text))
        re.compile(text)
    except (re.error, OverflowError, RecursionError, ValueError):
        return False
    return found.lengths <= MOST.lengths and found.optional <= MOST.optional


def choices(parsed: Any) -> Choices:
    """Raises ValueError for a repetition of something that has choices itself."""
    total = Choices()
    for code, argument in parsed:
        if code in REPEATS:
            low, high, body = argument
            inner = choices(body)
            if high > 1 and (inner != Choices() or branches(body)):
                raise ValueError("a repetition of what has choices")
            total += inner + (Choices(high > 1, high == 1) if low != high else Choices())
        elif code is codes.BRANCH:
            ways = [choices(way) for way in argument[1]]
            total += Choices(max(way.lengths for way in ways), max(way.optional for way in ways))
        else:
            for inside in subpatterns(argument):
                total += choices(inside)
    return total


def branches(parsed: Any) -> bool:
    return any(code is codes.BRANCH or any(map(branches, subpatterns(argument))) for code, argument in parsed)


def subpatterns(argument: Any) -> list[Any]:
    """Of a group, a look-ahead, a condition."""
    parts = argument if isinstance(argument, (tuple, list)) else [argument]
    return [part for part in parts if isinstance(part, parser.SubPattern)]
