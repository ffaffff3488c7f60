"""The live line of a run: step, loss, learning rate, tokens/s, memory, time left."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lowrank.train.hooks import Hook, StepRecord

PLAIN_LINES = 20  # of a whole run, where the output is no terminal


class ProgressLine(Hook):
    """Redrawn in place on a terminal; a plain line now and then anywhere else. Writes to standard error."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.started = first, last, time.monotonic()
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
        elif record.step % self.every == 0 or record.step in (self.first + 1, self.last):
            print(text, file=sys.stderr, flush=True)

    def describe(self, record: StepRecord) -> str:
        done = record.step - self.first
        left = (time.monotonic() - self.started) / done * (self.last - record.step)
        return (
            f"step {record.step}/{self.last}  loss {record.loss:.4f}  lr {record.lr:.2e}  "
            f"norm {record.grad_norm:.3f}  {record.tokens_per_s:,.0f} tokens/s  "
            f"{record.peak_memory_mb:,.0f} MB  {int(left // 60)}:{int(left % 60):02d} left"
        )

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
