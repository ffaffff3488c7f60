"""A run on a terminal: a few lines redrawn in place with its curve, speed, memory and time left.

Drawn from the loop's own thread, so that it takes none of the time of a step; while a long step runs it stands still.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from lowrank.report import figures
from lowrank.report.course import Curve
from lowrank.report.screen import Line, Screen, bars, clock, drawable, width
from lowrank.train.progress import Lines, Standing, View, line

PAUSE = 0.1  # seconds between two drawings at least
CURVE, BAR = 24, 40  # characters at most
GAP = "   "


def view(first: int, last: int, predicted_mb: float | None, asked: Callable[[], bool]) -> View:
    """The live view where standard error is a terminal of this process, else plain lines. ``asked``: to stop."""
    return Live(sys.stderr, predicted_mb, asked) if drawable(sys.stderr) else Lines(first, last)


class Live:
    """While it is there, what others print on this terminal through ``sys`` stands above it, to stay."""

    def __init__(self, stream: TextIO, predicted_mb: float | None, asked: Callable[[], bool]) -> None:
        self.screen, self.predicted_mb, self.asked = Screen(stream), predicted_mb, asked
        self.curve = Curve()
        self.standing: Standing | None = None
        self.drawn = 0.0
        self.before = (sys.stdout, sys.stderr)
        self.streams = [Above(one, self.screen) if one is stream or drawable(one) else one for one in self.before]
        sys.stdout, sys.stderr = self.streams

    def show(self, standing: Standing) -> None:
        self.standing = standing
        self.curve.add(standing.record.loss)
        if time.monotonic() - self.drawn >= PAUSE or standing.record.step == standing.last:
            self.draw(f"{clock(standing.left)} left" + after(standing.unmeasured))

    def judging(self) -> None:
        if self.standing is not None:
            self.draw("evaluating …")

    def draw(self, ends: str) -> None:
        if self.asked():
            self.screen.leave()  # the signal's handler has written below it
        elif self.standing is not None:
            columns = self.screen.size.columns
            told = flow(parts(self.standing, self.predicted_mb, self.bars(CURVE)), columns - 1)
            self.screen.draw([head(self.standing, ends, columns - 1), *told])
            self.drawn = time.monotonic()

    def bars(self, most: int) -> str:
        return bars(self.curve.points, most, self.screen.stream)

    def say(self, text: str) -> None:
        self.screen.above(f"{figures.clean(text)}\n")

    def close(self) -> None:
        """One plain line stays of it."""
        if self.asked():
            self.screen.leave()
        for stream in self.streams:
            if isinstance(stream, Above):
                stream.finish()
        sys.stdout, sys.stderr = self.before
        self.screen.draw([], above=f"{line(self.standing)}\n" if self.standing else "")


class Above:
    """Stands in for a stream of the terminal: whole lines go above the block."""

    def __init__(self, stream: TextIO, screen: Screen) -> None:
        self.stream, self.screen, self.begun = stream, screen, ""

    def write(self, text: str) -> int:
        whole, newline, rest = (self.begun + text).rpartition("\n")
        self.begun = rest.rpartition("\r")[2]  # of a line that is written over itself what it says now
        if newline:
            self.screen.above("".join(f"{one.rpartition(chr(13))[2]}\n" for one in whole.split("\n")))
        return len(text)

    def finish(self) -> None:
        if self.begun:
            self.write("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def head(standing: Standing, ends: str, columns: int) -> Line:
    """``step 120/400 ━━━━━─────── 2:14 left``"""
    step = f"step {standing.record.step}/{standing.last} "
    room = min(BAR, columns - len(step) - len(ends) - 1)
    full = room * standing.record.step // max(1, standing.last)
    bar = [("━" * full, "cyan"), ("─" * (room - full), "dim"), (" ", "")] if room >= 4 else []
    return [(step, "bold"), *bar, (ends, "dim")]


def after(unmeasured: int) -> str:
    return f" + {unmeasured} evaluation{'s' if unmeasured > 1 else ''}" if unmeasured else ""


def parts(standing: Standing, predicted_mb: float | None, curve: str) -> list[Line]:
    """What is told of a step, the most important first; each is kept in one piece."""
    record = standing.record
    over = predicted_mb is not None and record.peak_memory_mb > predicted_mb
    memory = f"{record.peak_memory_mb:,.0f} MB" + (f" of {predicted_mb:,.0f} predicted" if predicted_mb else "")
    found: list[Line] = [
        [("loss ", "dim"), (f"{record.loss:.4f}", "bold"), (f" {curve}", "cyan")],
        [(f"{record.tokens_per_s:,.0f}", ""), (" tokens/s", "dim")],
        [(memory, "yellow" if over else "")],
    ]
    if standing.judged is not None:
        found.append([("eval ", "dim"), (f"{standing.judged[1]:.4f}", ""), (f" at step {standing.judged[0]}", "dim")])
    found += [[("lr ", "dim"), (f"{record.lr:.2e}", "")], [("norm ", "dim"), (f"{record.grad_norm:.3f}", "")]]
    if standing.spikes:
        count, newest = len(standing.spikes), standing.spikes[-1]
        found.append([(f"{count} spike{'s' if count > 1 else ''}, the last at step {newest}", "yellow")])
    if standing.skipped:
        found.append([(f"{standing.skipped} skipped", "red")])
    return found


def flow(told: Sequence[Line], columns: int) -> list[Line]:
    """As many to a row as there is room for."""
    rows: list[list[tuple[str, str]]] = []
    for part in told:
        if rows and width(rows[-1]) + len(GAP) + width(part) <= columns:
            rows[-1] += [(GAP, ""), *part]
        else:
            rows.append(list(part))
    return list(rows)
