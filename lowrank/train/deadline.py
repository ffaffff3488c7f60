"""A wall-clock budget."""

from __future__ import annotations

import time

from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.stopping import Stoppable


class Deadline(Hook):
    """Asks the loop to leave when ``seconds`` (None: never) have passed since this was made: after a whole step, at
    least one, and after what the hooks before this one do."""

    def __init__(self, loop: Stoppable, seconds: float | None) -> None:
        self.loop, self.seconds, self.started, self.passed = loop, seconds, time.monotonic(), False

    def after_step(self, record: StepRecord) -> None:
        if self.seconds is not None and time.monotonic() - self.started >= self.seconds:
            self.loop.stop = self.passed = True
