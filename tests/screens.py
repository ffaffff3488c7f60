"""A terminal to write to, and what a person sees on it."""

from __future__ import annotations

import os
import re
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

CODE = re.compile(r"\x1b\[(\??)(\d*(?:;\d+)*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Terminal:
    """Of a few control codes: it fails at one that a program of ours has no need of."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines, self.row, self.column = [""], 0, 0  # those above the screen included

    def feed(self, text: str) -> Terminal:
        for private, number, code, control, plain in CODE.findall(text):
            match (private + code, control):
                case ("", "\r"):
                    self.column = 0
                case ("", "\n"):
                    self.down()
                case ("", ""):
                    self.put(plain)
                case ("m", _):
                    pass
                case ("A", _):
                    self.row = max(0, len(self.lines) - self.rows, self.row - int(number or 1))
                case ("J", _):
                    del self.lines[self.row + 1 :]
                    self.lines[self.row] = self.lines[self.row][: self.column]
                case ("?h" | "?l", _) if number == "2026":
                    pass
                case unknown:
                    raise AssertionError(f"a control code that changes the terminal: {unknown}, {number}")
        return self

    def down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")

    def put(self, text: str) -> None:
        for character in text:
            if self.column == self.columns:
                self.column = 0
                self.down()
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def resize(self, columns: int) -> None:
        """As terminals do: a line that has no room any more goes on in the next row."""
        before = self.lines[: self.row]
        self.lines = [line[at : at + columns] for line in before for at in range(0, max(1, len(line)), columns)] + [""]
        self.columns, self.row = columns, len(self.lines) - 1

    @property
    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.lines if line.strip()]


class Attached:
    """The two ends of a terminal: ``stream`` to write to, ``text`` what came out."""

    def __init__(self, columns: int, rows: int) -> None:
        self.outside, inside = os.openpty()
        self.stream: TextIO = os.fdopen(inside, "w", encoding="utf-8")
        self.size(columns, rows)
        self.seen = bytearray()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def size(self, columns: int, rows: int) -> None:
        termios.tcsetwinsize(self.stream.fileno(), (rows, columns))

    def read(self) -> None:
        while True:
            try:
                self.seen += os.read(self.outside, 65536)
            except OSError:  # the other end is closed
                return

    @property
    def text(self) -> str:
        """All that was written so far, closing the end that is written to."""
        if not self.stream.closed:
            self.stream.close()
        self.reader.join(20)
        return self.seen.decode()


@contextmanager
def terminal(columns: int = 100, rows: int = 30) -> Iterator[Attached]:
    made = Attached(columns, rows)
    try:
        yield made
    finally:
        if not made.stream.closed:
            made.stream.close()
        made.reader.join(20)
        os.close(made.outside)
