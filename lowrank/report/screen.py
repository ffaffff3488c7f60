"""A block of lines at the bottom of a terminal, redrawn in place.

No mode of the terminal is changed and the cursor stays visible, so that whatever ends the process, ``kill -9``
included, leaves a whole terminal.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import TextIO

from rich.cells import cell_len, set_cell_size

from lowrank.report import figures

Line = Sequence[tuple[str, str]]  # texts, each with the name of its style

STYLES = {"": "", "bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
SIZE = os.terminal_size((80, 24))  # where the terminal does not say
BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
TOGETHER = ("\x1b[?2026h", "\x1b[?2026l")  # a terminal that knows these shows what is between them at once


def drawable(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that can move its cursor, and this process is the one that it belongs to: of
    several that write to one terminal at once, those in the background print lines."""
    try:
        return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") and foreground(stream)
    except (ValueError, OSError):  # closed
        return False


def foreground(stream: TextIO) -> bool:
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except OSError:  # a terminal, but not the one that controls this process: nobody else draws on it
        return True


def bars(values: Sequence[float], width: int, stream: TextIO) -> str:
    """A curve in ``width`` characters at most, each the mean of its share of ``values``; what is not finite counts as
    the highest."""
    if not values or width < 1:
        return ""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    values = [value if math.isfinite(value) else max(known) for value in values]
    count = min(width, len(values))
    edges = [place * len(values) // count for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    marks = BARS if writes(stream, BARS) else PLAIN_BARS
    scale = (len(marks) - 1) / (high - low) if high > low else 0.0
    return "".join(marks[round((mean - low) * scale)] for mean in means)


def writes(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


class Screen:
    """``stream`` is a terminal that ``drawable`` has found to be one."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.lock = stream, threading.RLock()
        self.color = not os.environ.get("NO_COLOR")
        self.lines: list[Line] = []
        self.widths: list[int] = []  # of the lines that are drawn

    @property
    def size(self) -> os.terminal_size:
        try:
            found = os.get_terminal_size(self.stream.fileno())
        except (OSError, ValueError):
            return SIZE
        return os.terminal_size((found.columns or SIZE.columns, found.lines or SIZE.lines))

    def draw(self, lines: Sequence[Line], above: str = "") -> None:
        """``lines`` take the place of those drawn before; ``above`` is printed in front of them, to stay: alone, while
        another process has the terminal."""
        with self.lock:
            if not foreground(self.stream):
                self.write(above)
                return
            columns, rows = self.size
            self.lines = list(lines)
            fitted = [fit(line, columns - 1) for line in self.lines[: rows - 1]]
            text = "".join(f"{self.painted(line)}\n" for line in fitted)
            self.write(f"{TOGETHER[0]}{self.back(columns)}{above}{text}{TOGETHER[1]}")
            self.widths = [width(line) for line in fitted]

    def above(self, text: str) -> None:
        self.draw(self.lines, above=text)

    def leave(self) -> None:
        """The block stays where it is; the next one begins at the cursor."""
        self.lines, self.widths = [], []

    def back(self, columns: int) -> str:
        """To where the block begins, and nothing left below. A terminal that has become narrower has broken lines."""
        rows = sum(max(1, -(-width // columns)) for width in self.widths)
        return (f"\x1b[{rows}A" if rows else "") + "\r\x1b[J"

    def painted(self, line: Line) -> str:
        if not self.color:
            return "".join(text for text, _ in line)
        return "".join(f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style else text for text, style in line)

    def write(self, text: str) -> None:
        encoding = self.stream.encoding or "utf-8"
        self.stream.write(text.encode(encoding, errors="replace").decode(encoding))
        self.stream.flush()


def fit(line: Line, cells: int) -> list[tuple[str, str]]:
    """What of ``line`` has room in so many cells, a cut marked; on one row, and nothing that a terminal obeys."""
    line = [(figures.clean(text).replace("\n", " ").replace("\t", " "), style) for text, style in line]
    if width(line) <= cells:
        return line
    found: list[tuple[str, str]] = []
    left = max(0, cells - 1)
    for text, style in line:
        if cell_len(text) >= left:
            return [*found, (f"{set_cell_size(text, left)}…", style)]
        found.append((text, style))
        left -= cell_len(text)
    return found


def width(line: Line) -> int:
    """In cells of the terminal."""
    return sum(cell_len(text) for text, _ in line)


def padded(text: str, cells: int) -> str:
    """``text`` in so many cells, a cut marked."""
    text = figures.clean(text)
    return f"{set_cell_size(text, cells - 1)}…" if cell_len(text) > cells else set_cell_size(text, cells)


def clock(seconds: float) -> str:
    """``4:05``, ``1:04:05``"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
