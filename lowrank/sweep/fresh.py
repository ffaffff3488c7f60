"""A job in a process of its own: ``python train.py … hydra.run.dir=…``."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import Any

from lowrank.record.source import PACKAGE, entry
from lowrank.sweep.death import LAUNCHER
from lowrank.sweep.job import Job

OUTPUT = "output.log"  # in a job's folder: what it printed, where no terminal shows it


@dataclass(frozen=True)
class Task:
    """A job to be run now. ``place`` is its own among those of its sweep."""

    place: int
    job: Job
    resume: bool


@dataclass(frozen=True)
class Ended:
    task: Task
    code: int
    cause: str  # empty where it did not fail
    died: bool = False  # in a worker, which had it


class Fresh:
    def __init__(self, task: Task, variables: Mapping[str, str], *, quiet: bool) -> None:
        self.task, self.over = task, False
        self.told = tempfile.NamedTemporaryFile("r", prefix="lowrank-")  # noqa: SIM115  as long as the process
        variables = {**variables, "LOWRANK_CAUSE": self.told.name}
        with printing(task.job.folder / OUTPUT if quiet else None) as streams:
            self.process = started(task.job.process(resume=task.resume), variables, stdin=DEVNULL, **streams)

    alive = False  # when its job has ended, so has it

    @property
    def busy(self) -> bool:
        return not self.over

    def ended(self) -> list[Ended]:
        """The job, once, when it has ended."""
        code = None if self.over else self.process.poll()
        if code is None:
            return []
        self.over, cause = True, self.told.read().strip()
        self.told.close()
        return [Ended(self.task, code, "" if code == 0 else cause or status(code))]

    def signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def close(self) -> None:
        """Nothing is left of it."""


def started(command: Sequence[str], variables: Mapping[str, str], **streams: Any) -> Popen[bytes]:
    """A process that ends with this one. Its group is its own: Ctrl-C reaches this process alone, which passes it on,
    once."""
    environment = {**os.environ, **variables, LAUNCHER: str(os.getpid())}
    if entry() is not None:  # for a module of ours what a script's own folder is for train.py
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return Popen(command, env=environment, process_group=0, **streams)


@contextmanager
def printing(output: Path | None) -> Iterator[dict[str, Any]]:
    """The streams of a process that prints to the end of a file; None: where this process prints."""
    if output is None:
        yield {}
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        yield {"stdout": file, "stderr": STDOUT}


def status(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
