"""The live line of a run: step, loss, learning rate, tokens/s, memory, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lowrank.train.finite import Fault
from lowrank.train.hooks import Hook, StepRecord

PLAIN_LINES = 20  # of a whole run, where the output is no terminal


class ProgressLine(Hook):
    """Redrawn in place on a terminal; a plain line now and then anywhere else. Writes to standard error."""

    def __init__(self, first: int, last: int, note: Callable[[str], None]) -> None:
        self.first, self.last, self.started = first, last, time.monotonic()
        self.note = note  # in the run's log
        self.every = max(1, (last - first) // PLAIN_LINES)
        self.live: Progress | None = None
        if sys.stderr.isatty():
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
            self.live = Progress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.live.add_task("starting", total=last, completed=first)
            self.live.start()

    def after_step(self, record: StepRecord) -> None:
        text = self.describe(record)
        if self.live is not None:
            self.live.update(self.task, completed=record.step, description=text)
        elif record.step % self.every == 0 or record.step in (self.first + 1, self.last) or record.spike:
            print(text, file=sys.stderr, flush=True)

    def after_skip(self, fault: Fault) -> None:
        text = f"{fault} This batch is skipped."
        self.note(text)
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def describe(self, record: StepRecord) -> str:
        done = max(1, record.step - self.first)
        left = (time.monotonic() - self.started) / done * (self.last - record.step)
        spike = "  spike" if record.spike else ""
        return (
            f"step {record.step}/{self.last}  loss {record.loss:.4f}{spike}  lr {record.lr:.2e}  "
            f"norm {record.grad_norm:.3f}  {record.tokens_per_s:,.0f} tokens/s  "
            f"{record.peak_memory_mb:,.0f} MB  {int(left // 60)}:{int(left % 60):02d} left"
        )

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
