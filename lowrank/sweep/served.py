"""Jobs in a worker that has loaded their base: requests go to its standard input, answers come by a pipe of its own.

    {"jobs": [{"config": {…}, "folder": "…", "command": "…", "output": "…"}]}      one, or several that train together
    {"folder": "…", "code": 0, "cause": ""}                         of each job, when it has ended
    {"idle": true}                                                  all of them have

The number of the answers' descriptor is the worker's one argument. The end of its input ends it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

from lowrank.sweep.fresh import OUTPUT, Ended, Task, printing, started, status

WORKER = (sys.executable, "-P", "-m", "lowrank.sweep.worker")


class Served:
    """One worker. ``key`` tells which base it holds; ``output`` is a file, or None where it prints as we do."""

    def __init__(
        self, key: str, variables: Mapping[str, str], output: Path | None, worker: Sequence[str] = WORKER
    ) -> None:
        self.key, self.quiet = key, output is not None
        self.tasks, self.unread, self.idle = dict[str, Task](), b"", True
        self.answers, theirs = os.pipe()
        os.set_blocking(self.answers, False)
        command = [*worker, str(theirs)]
        try:
            with printing(output) as streams:
                self.process = started(command, variables, stdin=PIPE, pass_fds=(theirs,), **streams)
        finally:
            os.close(theirs)

    @property
    def busy(self) -> bool:
        return bool(self.tasks) or not self.idle

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def feed(self, tasks: Sequence[Task]) -> None:
        self.tasks, self.idle = {str(task.job.folder): task for task in tasks}, False
        jobs = [self.request(task) for task in tasks]
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: ``ended`` tells
            self.process.stdin.write(f"{json.dumps({'jobs': jobs})}\n".encode())
            self.process.stdin.flush()

    def request(self, task: Task) -> dict[str, object]:
        job = task.job
        output = {"output": str(job.folder / OUTPUT)} if self.quiet else {}
        return {"config": job.tree(resume=task.resume), "folder": str(job.folder), "command": job.command, **output}

    def ended(self) -> list[Ended]:
        """The jobs that have ended since this was last asked; of a worker that has died, all that it had."""
        dead = not self.alive  # before reading: what it said last is not lost
        found = [ended for line in self.lines() if (ended := self.answered(json.loads(line))) is not None]
        if dead and self.busy:
            code = self.process.returncode or 1
            found += [Ended(task, code, f"its worker: {status(code)}", died=True) for task in self.tasks.values()]
            self.tasks, self.idle = {}, True
        return found

    def lines(self) -> list[bytes]:
        with suppress(BlockingIOError):
            while piece := os.read(self.answers, 1 << 16):
                self.unread += piece
        *whole, self.unread = self.unread.split(b"\n")
        return [line for line in whole if line.strip()]

    def answered(self, told: Mapping[str, object]) -> Ended | None:
        if told.get("idle"):
            self.idle = True
            return None
        task, code = self.tasks.pop(str(told["folder"])), int(str(told["code"]))
        return Ended(task, code, "" if code == 0 else str(told.get("cause") or status(code)))

    def signal(self, number: int) -> None:
        if self.alive:
            self.process.send_signal(number)

    def close(self) -> None:
        """Ends the worker, which has nothing to do."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
        os.close(self.answers)
