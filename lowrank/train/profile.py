"""``loop.profile``: some steps under PyTorch's profiler, as a trace to look at and as shares of a step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from lowrank.disk import write_text
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.loop import Loop
from lowrank.train.shares import DATA, FORWARD, STEP, Shares, shares

Named = tuple[Any, str, str]  # an instance or a class, the name of a method of it, and what its time is to be called
TRACE, SHARES = "trace.json.gz", "shares.json"
KINETO = "KINETO_LOG_LEVEL"  # else its library prints a line at each start and stop


class Profile(Hook):
    """Profiles ``steps`` steps after the first that it sees, which warms up, and writes what it found into ``folder``.

    Ranges are put around the loop's own parts, and the methods that are ``named``, while it records and at no other
    time: a run without it does nothing more, and one with it computes the same bits.
    """

    def __init__(
        self,
        loop: Loop,
        folder: Path,
        steps: int,
        *,
        last: int,
        say: Callable[[str], None],
        named: Sequence[Named] = (),
    ) -> None:
        self.loop, self.folder, self.steps, self.last, self.say = loop, folder, steps, last, say
        self.named = named
        self.recording: ExitStack | None = None
        self.profiler: Any = None
        self.first = 0

    def after_step(self, record: StepRecord) -> None:
        over = self.loop.stop or record.step == self.last
        if self.recording is not None and (over or record.step - self.first + 1 >= self.steps):
            self.end()
        elif self.profiler is None and not over:
            self.begin(record.step + 1)

    def begin(self, first: int) -> None:
        """``first`` is the step that comes next."""
        os.environ.setdefault(KINETO, "99")
        self.first, self.recording = first, ExitStack()
        wanted = [torch.profiler.ProfilerActivity.CPU]
        if self.loop.device.type == "cuda":
            wanted.append(torch.profiler.ProfilerActivity.CUDA)
        own = [(self.loop, "step", STEP), (self.loop, "forward", FORWARD), (self.loop.batches, "at", DATA)]
        self.recording.enter_context(ranges([*own, *self.named]))
        self.profiler = self.recording.enter_context(torch.profiler.profile(activities=wanted))

    def end(self) -> Shares | None:
        """Stops, writes and tells; None where no whole step was recorded."""
        assert self.recording is not None
        self.recording.close()
        self.recording = None
        found = shares(self.profiler.events(), self.first, self.loop.device.type)
        if not found.steps:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.folder / TRACE))
        write_text(self.folder / SHARES, json.dumps(found.to_dict(), indent=2) + "\n")
        self.say(f"{found}\n  {self.folder / TRACE}: for chrome://tracing or ui.perfetto.dev")
        return found

    def close(self) -> None:
        """The run ends: what there is, is written."""
        if self.recording is not None:
            self.end()


@contextmanager
def ranges(named: Sequence[Named]) -> Iterator[None]:
    """Inside, a call of each of these methods is a range of the profiler's; afterwards they are what they were."""
    with ExitStack() as back:
        for owner, name, called in named:
            before = vars(owner).get(name)
            setattr(owner, name, ranged(called, getattr(owner, name)))
            back.callback(put_back, owner, name, before)
        yield


def put_back(owner: Any, name: str, before: Any) -> None:
    if before is None:
        delattr(owner, name)
    else:
        setattr(owner, name, before)


def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return call
