"""Finding a data file, and the words for what is wrong in one."""

from __future__ import annotations

import os
from pathlib import Path
from unicodedata import east_asian_width

from lowrank.errors import ConfigError, DataError, nearest

EXCERPT = 40  # characters shown to either side of a mistake


def locate(given: str | None, key: str) -> Path:
    """The file that the user named under the configuration key ``key``; DataError if it is not there."""
    if not given:
        raise ConfigError(f"{key}: not set; data=jsonl and data=csv read a file.")
    path = Path(os.path.expanduser(given))
    if os.path.isfile(path):
        return path
    if os.path.exists(path):
        raise DataError(f"{key}: '{given}' is not a regular file.")
    folder = path.parent
    if not os.path.isdir(folder):
        raise DataError(f"{key}: no file '{given}': the folder '{folder}' does not exist.")
    meant = nearest(path.name, sorted(os.listdir(folder)))
    raise DataError(f"{key}: no file '{given}'." + (f" Did you mean '{folder / meant}'?" if meant else ""))


def excerpt(line: str, column: int, message: str) -> str:
    """The part of ``line`` around the 1-based ``column``, a caret under it, ``message`` beside it."""
    start, end = max(0, column - 1 - EXCERPT), column - 1 + EXCERPT
    head, tail = "…" * (start > 0), "…" * (end < len(line))
    before, after = printable(line[start : column - 1]), printable(line[column - 1 : end])
    width = sum(2 if east_asian_width(character) in "WF" else 1 for character in head + before)
    return f"  {head}{before}{after}{tail}\n  {' ' * width}^ {message}"


def printable(text: str) -> str:
    """``text`` with a blank for each character that could move a terminal's cursor."""
    return "".join(character if character.isprintable() else " " for character in text)


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    match value:
        case None:
            return "null"
        case bool():
            return "a truth value"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def listed(names: list[str]) -> str:
    """``instruction, input, output``; a long list is cut."""
    return ", ".join(names[:20]) + (f", … {len(names) - 20} more" if len(names) > 20 else "")


def counted(number: int, noun: str) -> str:
    """``1 cell``, ``3,605 records``."""
    return f"{number:,} {noun}" + "s" * (number != 1)
