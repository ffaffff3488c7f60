"""What becomes of one job of a sweep."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lowrank.errors import RefusedError
from lowrank.record import lock
from lowrank.sweep.fresh import Ended
from lowrank.sweep.standing import summary, write_failed

WAITING, RUNNING, DONE, SKIPPED = "waiting", "running", "done", "skipped"
FAILED, INTERRUPTED = "failed", "interrupted"


@dataclass
class Course:
    status: str = WAITING
    cause: str = ""  # why it is not done; the whole of what it said
    owner: str = ""  # the process outside of this sweep that has its folder
    look: float = 0.0  # when to look at the folder again
    alone: bool = False  # one of several that a worker died with: which one's fault that was shows alone
    before: dict[str, Any] = field(default_factory=dict)  # its summary when it was started

    @property
    def failed(self) -> bool:
        """Whether the command must say so. A run that its own ``loop.max_seconds`` ended is told of, and no failure."""
        return self.status == FAILED or (self.status == INTERRUPTED and bool(self.cause))

    def end(self, ended: Ended, *, asked: bool) -> None:
        """``asked``: whether this sweep has been told to stop. Leaves a summary where the job could not write one."""
        folder, found = ended.task.job.folder, summary(ended.task.job.folder)
        fresh = found != self.before
        status = found.get("status") if fresh else None
        if ended.code == 0:
            self.status = INTERRUPTED if found.get("status") == INTERRUPTED else DONE
        elif status == DONE and ended.code < 0:
            self.status = DONE  # killed when nothing was left to do
        elif status == INTERRUPTED or (asked and (ended.code < 0 or ended.code == 130)):
            self.status, self.cause = INTERRUPTED, ended.cause
        else:
            self.status, self.cause = FAILED, ended.cause
            if not fresh:
                with suppress(RefusedError, OSError), lock.owned(folder):
                    write_failed(folder, ended.cause, ended.task.job.command)
