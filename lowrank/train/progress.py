"""How far a run is: what a view of it is told of each step, and the view that prints plain lines."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from lowrank.train.finite import Fault
from lowrank.train.hooks import Hook, StepRecord

PLAIN_LINES = 20  # of a whole run, where the output is no terminal
RECENT = 32  # steps that the pace is the mean of


@dataclass(frozen=True)
class Standing:
    """Where a run is after a step."""

    record: StepRecord
    first: int  # the step that this process began after
    last: int
    left: float  # seconds to the last step, with those of the evaluations until then whose length is known
    unmeasured: int  # evaluations until then, where none has been timed yet
    judged: tuple[int, float] | None  # the newest held-out loss, and the step it is of
    spikes: tuple[int, ...]  # the steps that were
    skipped: int  # batches


class View(Protocol):
    def show(self, standing: Standing) -> None: ...
    def judging(self) -> None:
        """An evaluation begins."""

    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class Lines:
    """A line now and then on standard error, and for every spike."""

    def __init__(self, first: int, last: int) -> None:
        self.every = max(1, (last - first) // PLAIN_LINES)

    def show(self, standing: Standing) -> None:
        step = standing.record.step
        if step % self.every == 0 or step in (standing.first + 1, standing.last) or standing.record.spike:
            self.say(line(standing))

    def judging(self) -> None:
        pass

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def line(standing: Standing) -> str:
    record, left = standing.record, standing.left
    spike = "  spike" if record.spike else ""
    judged = f"  eval {standing.judged[1]:.4f}" if standing.judged else ""
    return (
        f"step {record.step}/{standing.last}  loss {record.loss:.4f}{spike}{judged}  lr {record.lr:.2e}  "
        f"norm {record.grad_norm:.3f}  {record.tokens_per_s:,.0f} tokens/s  "
        f"{record.peak_memory_mb:,.0f} MB  {int(left // 60)}:{int(left % 60):02d} left"
    )


class Pace:
    """How long steps and evaluations take, timed apart, of a run of ``last`` steps evaluated each ``every``."""

    def __init__(self, last: int, every: int) -> None:
        self.last, self.every = last, every
        self.steps: deque[float] = deque(maxlen=RECENT)
        self.evaluations: deque[float] = deque(maxlen=RECENT)
        self.began, self.away, self.warm = time.monotonic(), 0.0, False

    def step(self) -> None:
        now = time.monotonic()
        if len(self.steps) == 1 and not self.warm:  # the first step compiles, allocates, warms caches
            self.steps.clear()
            self.warm = True
        self.steps.append(max(0.0, now - self.began - self.away))
        self.began, self.away = now, 0.0

    @contextmanager
    def judging(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.evaluations.append(time.monotonic() - began)
        self.away += self.evaluations[-1]

    def waiting(self, step: int) -> int:
        """Evaluations after that of ``step``: the last step has one, whatever its number."""
        periodic = self.last // self.every - step // self.every if self.every else 0
        return periodic + (step < self.last and (not self.every or self.last % self.every != 0))

    def left(self, step: int) -> float:
        each = sum(self.evaluations) / len(self.evaluations) if self.evaluations else 0.0
        return sum(self.steps) / max(1, len(self.steps)) * (self.last - step) + each * self.waiting(step)


class Progress(Hook):
    """Tells ``view`` of each step from the one after ``first`` on; to be called after the step's evaluation.

    ``held_out`` gives the loss of an evaluation at a step, or None where there was none.
    """

    def __init__(
        self,
        first: int,
        last: int,
        view: View,
        note: Callable[[str], None],
        *,
        every: int = 0,
        held_out: Callable[[int], float | None] = lambda step: None,
    ) -> None:
        self.first, self.last, self.view, self.note, self.held_out = first, last, view, note, held_out
        self.pace = Pace(last, every)
        self.judged: tuple[int, float] | None = None
        self.spikes: tuple[int, ...] = ()
        self.skipped = 0

    def after_step(self, record: StepRecord) -> None:
        self.pace.step()
        loss = self.held_out(record.step)
        if loss is not None:
            self.judged = record.step, loss
        if record.spike:
            self.spikes += (record.step,)
        self.view.show(self.standing(record))

    def standing(self, record: StepRecord) -> Standing:
        unmeasured = 0 if self.pace.evaluations else self.pace.waiting(record.step)
        left = self.pace.left(record.step)
        return Standing(record, self.first, self.last, left, unmeasured, self.judged, self.spikes, self.skipped)

    def after_skip(self, fault: Fault) -> None:
        text = f"{fault} This batch is skipped."
        self.skipped += 1
        self.note(text)
        self.view.say(text)

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Around an evaluation."""
        self.view.judging()
        with self.pace.judging():
            yield

    def close(self) -> None:
        self.view.close()
