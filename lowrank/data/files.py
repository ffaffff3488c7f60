"""Rows of a jsonl or csv file, one at a time; whatever is wrong with a row is said with its number."""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from unicodedata import east_asian_width

from lowrank.errors import ConfigError, DataError, nearest

LONGEST_CELL = 2**31 - 1  # csv's own limit, 128 KiB, is less than a long document
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


def rows(kind: str, path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """(line it starts on, {column: value}) of each row of a ``jsonl`` or ``csv`` file, in file order.

    Blank lines are passed over. Raises DataError on the first row that cannot be read.
    """
    return jsonl_rows(path) if kind == "jsonl" else csv_rows(path)


def lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, without a byte-order mark."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode()
            except UnicodeDecodeError:
                raise DataError(f"{path.name}:{number}: {not_utf8(raw)} Save the file as UTF-8.") from None


def not_utf8(raw: bytes) -> str:
    """Which byte of a line is not UTF-8; Excel's "Unicode text" is UTF-16."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "not UTF-8 but UTF-16 (byte 1 is its mark)."
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the line is 0x{raw[error.start]:02x})."
    raise AssertionError("called with a line that decodes")


def jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """One JSON object a line."""
    for number, line in enumerate(lines(path), 1):
        line = line.rstrip("\r\n")
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            hint = "\nOne JSON object a line is expected." if line.strip() in "[{" else ""
            shown = excerpt(line, error.colno, error.msg)
            raise DataError(f"{where}: not valid JSON (column {error.colno}).\n{shown}{hint}") from None
        except (ValueError, RecursionError):  # an integer of thousands of digits, [[[[[…
            raise DataError(f"{where}: a number too long, or brackets too deep, to be read.") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: {kind_of(row)}; one JSON object a line is expected.")
        yield number, row


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Comma-separated rows under a header; quoted cells may span lines."""
    header: list[str] = []
    for start, cells in csv_cells(path):
        if not header:
            header = cells
            if repeated := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(f"{path.name}:{start}: the header names '{repeated[0]}' more than once.")
        elif len(cells) != len(header):
            columns = f"the header has {len(header)} ({listed(header)})"
            raise DataError(f"{path.name}:{start}: {counted(len(cells), 'cell')}, but {columns}.")
        else:
            yield start, dict(zip(header, cells, strict=True))


def csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line it starts on, cells) of every row that is not blank, the header's included."""
    reader, start = csv.reader(lines(path), strict=True), 1
    limit = csv.field_size_limit(LONGEST_CELL)  # the module's global: put back below
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path.name}:{start}: not valid CSV ({error}).") from None
    finally:
        csv.field_size_limit(limit)


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
