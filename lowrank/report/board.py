"""The jobs of a sweep as they go: a live table on a terminal, a plain line for each start and end elsewhere.

Reads what the jobs write and nothing else. Whatever happens here, the sweep goes on: a board that cannot write stays
silent. While ``live``, nothing but ``say`` should write to the stream's terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, TextIO

from lowrank.report import figures
from lowrank.report.course import Course
from lowrank.report.screen import Line, Screen, bars, clock, drawable, padded, width

WAITING, RUNNING, DONE, SKIPPED, FAILED, INTERRUPTED = "waiting", "running", "done", "skipped", "failed", "interrupted"
ORDER = (RUNNING, FAILED, INTERRUPTED, DONE, SKIPPED, WAITING)  # where there is no room for all, the last are left out
MARKS = {RUNNING: ">", FAILED: "x", INTERRUPTED: "!", DONE: "+", SKIPPED: "=", WAITING: " "}  # on a narrow terminal
STYLE = {RUNNING: "bold", FAILED: "red", INTERRUPTED: "yellow", DONE: "green", SKIPPED: "green", WAITING: "dim"}
CURVE = 12  # characters


def harmless(method: Callable[..., None]) -> Callable[..., None]:
    """A board only shows: a pipe that is closed, or a bug of its own, ends no sweep."""

    @wraps(method)
    def attempted(*arguments: Any, **named: Any) -> None:
        with suppress(Exception):
            method(*arguments, **named)

    return attempted


class Row:
    """One job. ``course`` is what its metrics tell."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.course = name, folder, Course(folder)
        self.state, self.cause = WAITING, ""
        self.began = self.took = self.over = 0.0  # a moment, seconds, a moment


class Board:
    """``jobs``: the name that tells each from the others, and its folder. A job is told of by its place in it."""

    def __init__(self, jobs: Sequence[tuple[str, Path]], stream: TextIO) -> None:
        self.rows, self.stream = [Row(name, Path(folder)) for name, folder in jobs], stream
        self.screen = Screen(stream) if drawable(stream) else None
        self.began, self.lanes = time.monotonic(), 1

    @property
    def live(self) -> bool:
        return self.screen is not None

    @harmless
    def started(self, place: int) -> None:
        row = self.rows[place]
        row.state, row.began = RUNNING, time.monotonic()
        self.lanes = max(self.lanes, len(self.having(RUNNING)))
        self.tell(f"{self.label(place)} {row.name} → {row.folder}")

    @harmless
    def ended(self, place: int, status: str, cause: str = "") -> None:
        """``status``: done, skipped (it was done already), failed or interrupted; ``cause``: ``exit 4``."""
        row = self.rows[place]
        started = row.state == RUNNING
        row.course.read()
        row.state, row.cause = status, cause
        row.over = time.monotonic()
        row.took = row.over - row.began if started else 0.0
        because = f" ({cause})" if cause else " (done already)" if status == SKIPPED else ""
        which = "" if started else f": {row.name} → {row.folder}"
        self.tell(f"{self.label(place)} {status}{because}{which}")

    @harmless
    def refresh(self) -> None:
        """To be called twice a second or so."""
        if self.screen is not None:
            for row in self.having(RUNNING):
                row.course.read()
            self.screen.draw(self.lines())

    @harmless
    def say(self, text: str) -> None:
        """A line that stays, above the table."""
        if self.screen is not None:
            self.screen.draw(self.lines(), above=f"{figures.clean(text)}\n")
        else:
            self.tell(text)

    @harmless
    def close(self) -> None:
        """The table stays as it is now."""
        if self.screen is not None:
            self.refresh()
            self.screen = None

    def label(self, place: int) -> str:
        return f"[{place + 1}/{len(self.rows)}]"

    def tell(self, text: str) -> None:
        if self.screen is not None:
            self.screen.draw(self.lines())
            return
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(f"{text}\n".encode(encoding, errors="replace").decode(encoding))
        self.stream.flush()

    def having(self, *states: str) -> list[Row]:
        return [row for row in self.rows if row.state in states]

    def lines(self) -> list[Line]:
        """The running jobs first, then what failed, then what ended last; as many as the terminal has room for."""
        assert self.screen is not None
        columns, rows = self.screen.size
        room = max(1, rows - 2)  # below the summary, and above the cursor
        ordered = sorted(self.rows, key=lambda row: (ORDER.index(row.state), -row.over))
        shown = ordered if len(ordered) <= room else ordered[: max(1, room - 1)]
        left = [row.state for row in ordered[len(shown) :]]
        counts = ", ".join(f"{left.count(state)} {state}" for state in ORDER if state in left)
        more: list[Line] = [[(f"… {counts}", "dim")]] if left else []
        told = [self.told(row, columns) for row in shown]
        longest = max((len(row.name) for row in shown), default=0)
        names = max(8, min(longest, columns - 1 - max(map(width, told), default=0)))
        lines = [[(padded(row.name, names), ""), *line] for row, line in zip(shown, told, strict=True)]
        return [self.summary(columns), *lines, *more]

    def summary(self, columns: int) -> Line:
        counts = {state: len(self.having(state)) for state in ORDER}
        parts = [(f"{counts[DONE] + counts[SKIPPED]}/{len(self.rows)} done", "green")]
        parts += [
            (f"{counts[state]} {state}", STYLE[state]) for state in (RUNNING, FAILED, INTERRUPTED) if counts[state]
        ]
        if columns >= 60:
            parts.append((f"{counts[WAITING]} {WAITING}", STYLE[WAITING]))
        left = self.left()
        if left is not None:
            parts.append((f"{clock(left)} left", "bold"))
        gap = "  " if columns >= 60 else " "
        return [(text if place == 0 else gap + text, style) for place, (text, style) in enumerate(parts)]

    def left(self) -> float | None:
        """Seconds of the whole sweep, if what waits takes as long as what has been done, so many at a time as now."""
        running, waiting = self.having(RUNNING), len(self.having(WAITING))
        if not running and not waiting:
            return None
        taken = [row.took for row in self.having(DONE) if row.took]
        known = [left for row in running if (left := row.course.left()) is not None]
        now = time.monotonic()
        whole = taken or [now - row.began + left for row in running if (left := row.course.left()) is not None]
        if not whole:
            return None
        mean = sum(whole) / len(whole)
        unknown = sum(max(0.0, mean - (now - row.began)) for row in running if row.course.left() is None)
        return max([(sum(known) + unknown + waiting * mean) / self.lanes, *known])

    def told(self, row: Row, columns: int) -> Line:
        """What stands behind a job's name; the less important columns are left out on a narrow terminal."""
        course, running = row.course, row.state == RUNNING
        steps = f"{course.step}/{course.last or '?'}" if course.step else ""
        state = f"  {row.state:<11}" if columns >= 64 else f" {MARKS[row.state]}"
        parts = [(state, STYLE[row.state]), (f" {steps:>9}", "")]
        if columns >= 64:
            parts.append((f"  {bars(course.curve.points, CURVE, self.stream):<{CURVE}}", "cyan"))
        if columns >= 100:
            parts.append((f"{figures.fixed(course.speed) if course.speed and running else '':>9}", ""))
            parts.append((" tokens/s" if course.speed and running else " " * 9, "dim"))
        if columns >= 80:
            parts.append((f"  {f'eval {course.judged:.3f}' if course.judged is not None else '':<10}", ""))
        return [*parts, (f"  {ending(row)}", "dim")]


def ending(row: Row) -> str:
    """What is left of a job that runs; what one has taken that does not, and why it has failed."""
    if row.state != RUNNING:
        return f"{clock(row.took) if row.took else ''} {row.cause}".strip()
    left = row.course.left()
    if not row.course.step:
        return "starting"
    if row.course.step == row.course.last:
        return "finishing"
    return "" if left is None else f"{clock(left)} left"
