"""A jsonl or csv file, read once, a row at a time: its rows, what was wrong with others, and the hash of what was read.

Nobody vouches for such a file. A line is never longer in memory than ``LONGEST``, and whatever is wrong with a row is
said with the number of the line that it starts on.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lowrank.data.files import counted, excerpt, kind_of, listed, printable
from lowrank.errors import DataError

LONGEST = 64 * 2**20  # bytes of a line, and of a csv row; csv's own limit, 128 KiB a cell, is less than a long document
CHUNK = 2**20
TOLD = 3  # rows that a note names
MAGIC = {
    b"\x1f\x8b": "compressed (gzip): gunzip it",
    b"PK\x03\x04": "a zip archive: unzip it",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): unzstd it",
    b"\xfd7zXZ\x00": "compressed (xz): unxz it",
    b"BZh91AY": "compressed (bzip2): bunzip2 it",
    b"PAR1": "a Parquet file: write it as jsonl",
    b"ARROW1": "an Arrow file: write it as jsonl",
    b"SQLite format 3": "a SQLite database: write it as jsonl",
    codecs.BOM_UTF16_LE: "not UTF-8 but UTF-16 (byte 1 is its mark). Save the file as UTF-8",
    codecs.BOM_UTF16_BE: "not UTF-8 but UTF-16 (byte 1 is its mark). Save the file as UTF-8",
}


class Line(NamedTuple):
    number: int
    text: str  # with its end
    fault: str = ""  # why it cannot be read


class Unreadable(Exception):
    """A row is not what its format says; the text says why."""


class Table:
    """``rows()`` gives (line it starts on, {column: value}) in file order; blank lines are passed over.

    With ``on_malformed="error"`` the first row that cannot be read raises DataError; with ``"drop"`` such rows are
    counted in ``dropped``, and the reasons of the first ones kept. What is wrong with the file as a whole (a header, an
    archive, a file that changes meanwhile) always raises.
    """

    def __init__(self, kind: str, path: Path, on_malformed: str = "error") -> None:
        self.kind, self.path, self.on_malformed = kind, path, on_malformed
        self.hash = hashlib.sha256()
        self.seen = 0  # rows, also those that were dropped
        self.dropped = 0
        self.reasons: dict[int, str] = {}  # of the first rows that were

    @property
    def sha256(self) -> str:
        """Of the bytes that were read; after the last row, what ``sha256sum`` prints."""
        return self.hash.hexdigest()

    def rows(self) -> Iterator[tuple[int, dict[str, object]]]:
        for number, row in self.jsonl_rows() if self.kind == "jsonl" else self.csv_rows():
            self.seen += 1
            yield number, row

    def refuse(self, number: int, why: str) -> None:
        """A row that cannot be used: DataError, or it is counted as dropped."""
        if self.on_malformed == "error":
            raise DataError(f"{self.path.name}:{number}: {why}")
        self.dropped += 1
        if len(self.reasons) < TOLD:
            self.reasons[number] = why

    def notes(self) -> tuple[str, ...]:
        """What was dropped, in a line; nothing where all rows were read. Raises DataError where none was."""
        if not self.dropped:
            return ()
        first = [f"row {number}: {why.splitlines()[0].rstrip('.')}" for number, why in self.reasons.items()]
        told = "; ".join(first) + ("; …" if self.dropped > TOLD else "")
        if self.dropped >= self.seen:
            raise DataError(f"{self.path.name}: none of its {counted(self.seen, 'row')} can be read ({told}).")
        return (f"data: {self.dropped:,} of {counted(self.seen, 'row')} of {self.path.name} dropped ({told})",)

    def lines(self) -> Iterator[Line]:
        """The file's lines with their ends, without a byte-order mark."""
        with self.path.open("rb") as file:
            before, number = stamp(file), 0
            while raw := file.readline(LONGEST + 1):
                number += 1
                self.hash.update(raw)
                if number == 1:
                    self.refuse_binary(raw)
                yield line(number, raw)
                while len(raw) == LONGEST + 1 and not raw.endswith(b"\n"):  # passed over, in pieces
                    raw = file.readline(LONGEST + 1)
                    self.hash.update(raw)
            if stamp(file) != before:
                raise DataError(f"{self.path.name}: changed while it was read. Try again when nothing writes to it.")

    def refuse_binary(self, start: bytes) -> None:
        for magic, what in MAGIC.items():
            if start.startswith(magic):
                raise DataError(f"{self.path.name}:1: {what}.")

    def jsonl_rows(self) -> Iterator[tuple[int, dict[str, object]]]:
        """One JSON object a line."""
        for number, text, fault in self.lines():
            if not fault and not text.strip():
                continue
            try:
                yield number, json_row(text.rstrip("\r\n"), fault)
            except Unreadable as error:
                self.seen += 1
                self.refuse(number, str(error))

    def csv_rows(self) -> Iterator[tuple[int, dict[str, object]]]:
        """Comma-separated rows under a header; quoted cells may span lines."""
        header: list[str] = []
        for start, cells in self.csv_cells():
            if not header:
                header = cells
                if repeated := sorted(name for name, count in Counter(header).items() if count > 1):
                    raise DataError(f"{self.path.name}:{start}: the header names '{repeated[0]}' more than once.")
            elif len(cells) != len(header):
                columns = f"the header has {len(header)} ({listed(header)})"
                self.seen += 1
                self.refuse(start, f"{counted(len(cells), 'cell')}, but {columns}.")
            else:
                yield start, dict(zip(header, cells, strict=True))

    def csv_cells(self) -> Iterator[tuple[int, list[str]]]:
        """(line it starts on, cells) of every row that is not blank, the header's included.

        A row that is no CSV is its first line alone: what an unclosed quote has swallowed is read again.
        """
        source, again = self.lines(), deque[Line]()
        header = True
        while True:
            taken: list[Line] = []
            try:
                cells = one_row(source, again, taken)
            except Unreadable as error:
                if header:  # nothing can be read without it
                    raise DataError(f"{self.path.name}:{taken[0].number}: {error}") from None
                self.seen += 1
                self.refuse(taken[0].number, str(error))
                again.extendleft(reversed(taken[1:]))
                continue
            if cells is None:
                return
            if cells:
                header = False
                yield taken[0].number, cells


def stamp(file: BinaryIO) -> tuple[int, int]:
    """What changes when somebody writes to the file."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def line(number: int, raw: bytes) -> Line:
    if len(raw) > LONGEST:
        return Line(number, "", f"longer than {LONGEST // 2**20} MiB, which no row may be.")
    raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
    if b"\0" in raw:
        return Line(number, "", f"holds a zero byte (byte {raw.index(0) + 1} of the line), which is not text.")
    try:
        return Line(number, raw.decode())
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} of the line is 0x{raw[error.start]:02x}"
        return Line(number, "", f"not UTF-8 ({where}). Save the file as UTF-8.")


def json_row(text: str, fault: str) -> dict[str, object]:
    """The object of a line. Raises Unreadable."""
    if fault:
        raise Unreadable(fault)
    try:
        row = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        hint = "\nOne JSON object a line is expected." if text.strip() in "[{" else ""
        hint = "\nIts lines end in CR alone; save it with LF." if error.msg == "Extra data" and "\r" in text else hint
        shown = excerpt(text, error.colno, error.msg)
        raise Unreadable(f"not valid JSON (column {error.colno}).\n{shown}{hint}") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, [[[[[…
        raise Unreadable("a number too long, or brackets too deep, to be read.") from None
    if not isinstance(row, dict):
        raise Unreadable(f"{kind_of(row)}; one JSON object a line is expected.")
    return row


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object's pairs; Python's own reader would take the last of two values of one name, and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise Unreadable(f"'{printable(twice[:80])}' is there more than once.")
    return found


def one_row(source: Iterator[Line], again: deque[Line], taken: list[Line]) -> list[str] | None:
    """The cells of the next csv row, empty for a blank line, None at the end; ``taken`` are the lines it stood on."""

    def feed() -> Iterator[str]:
        size = 0
        while following := again.popleft() if again else next(source, None):
            taken.append(following)
            size += len(following.text)
            if following.fault or size > LONGEST:
                raise Unreadable(following.fault or f"longer than {LONGEST // 2**20} MiB, which no row may be.")
            yield following.text

    limit = csv.field_size_limit(LONGEST)  # the module's global: put back below
    try:
        return next(csv.reader(feed(), strict=True), None)
    except csv.Error as error:
        why = "its lines end in CR alone; save it with LF" if "new-line" in str(error) else str(error)
        raise Unreadable(f"not valid CSV ({why}).") from None
    finally:
        csv.field_size_limit(limit)
