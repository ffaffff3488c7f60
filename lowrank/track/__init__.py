"""Sending a run's figures to a tracker as they come; ``metrics.jsonl`` holds them whatever happens here.

A tracker only observes. It is called from a thread of its own, so that the run does not wait for it: one that fails
says so once on standard error, one that hangs is left behind, and the run goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any

from lowrank import classes
from lowrank.errors import ConfigError
from lowrank.schema import Track
from lowrank.secrets import redacted, redacted_tree
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.metrics import read

WAITING = 10_000  # calls: of a tracker that has fallen further behind the newest are dropped
PATIENCE = 120.0  # seconds that the end of a run waits for its tracker
Call = Callable[[], None]


class Tracker:
    """What to subclass; every method may be left out. Made anew when a run is resumed."""

    def __init__(self, track: Track, folder: Path, config: Mapping[str, Any]) -> None:
        """``folder``: the run directory; ``config``: the configuration, without secrets."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """``train/…`` of a step, or ``eval/…`` of an evaluation. A resumed run repeats steps from its checkpoint on."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The lines of samples.jsonl, at the end of a run."""

    def attach(self, step: int, path: Path) -> None:
        """report.html, at the end of a run, interrupted and failed ones too."""

    def close(self) -> None:
        """The last call."""


class Tracking(Hook):
    """Gives each step and each evaluation to a tracker, and at the end what the run directory then holds."""

    def __init__(self, kind: str, tracker: Tracker, folder: Path, patience: float = PATIENCE) -> None:
        self.kind, self.tracker, self.folder, self.patience = kind, tracker, folder, patience
        self.step = 0
        self.failed = False
        self.calls: Queue[Call | None] = Queue(WAITING)
        self.thread = Thread(target=self.work, name="tracker", daemon=True)
        self.thread.start()

    def after_step(self, record: StepRecord) -> None:
        self.step = record.step
        self.send("train", record.step, {name: value for name, value in vars(record).items() if name != "step"})

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.send("eval", step, metrics)

    def send(self, of: str, step: int, metrics: Mapping[str, Any]) -> None:
        values = {f"{of}/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
        self.put(lambda: self.tracker.log(step, values))

    def put(self, call: Call | None) -> None:
        try:
            self.calls.put_nowait(call)
        except Full:
            self.complain(TimeoutError(f"{WAITING:,} calls behind"))

    def work(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                call()
            except (Exception, SystemExit) as error:  # a tracker's own trouble, of whatever kind
                self.complain(error)

    def complain(self, error: BaseException) -> None:
        if not self.failed:
            self.failed = True
            complain(self.kind, error)

    def close(self) -> None:
        """After the run's files are written; waits until the tracker has them, or is given up."""
        samples, report = self.folder / "samples.jsonl", self.folder / "report.html"
        if samples.is_file():
            self.put(lambda: self.tracker.samples(self.step, read(samples)))
        if report.is_file():
            self.put(lambda: self.tracker.attach(self.step, report))
        self.put(self.tracker.close)
        self.put(None)
        self.thread.join(self.patience)
        if self.thread.is_alive():
            self.complain(TimeoutError(f"no answer in {self.patience:g} s"))


def tracker(track: Track, folder: Path, config: dict[str, Any]) -> Tracking | None:
    """The hook for ``track.kind``, writing to the run directory ``folder``; ``config`` is recorded beside the curves.

    None for ``none``, and for a tracker that cannot start (said on standard error). Raises ConfigError where its
    package is not installed.
    """
    if track.kind == "none":
        return None
    start = tracker_class(track)
    name = None if track.name is None else redacted(track.name)
    track = replace(track, project=redacted(track.project), name=name)
    told = track.target or track.kind
    try:
        return Tracking(told, start(track, folder, redacted_tree(config)), folder)
    except (Exception, SystemExit) as error:  # not logged in, no network, a folder that cannot be written …
        complain(told, error)
        return None


def tracker_class(track: Track) -> type[Tracker]:
    """The kind's class, its package imported. Raises ConfigError where that is not installed."""
    if track.target is not None:
        return classes.resolve(track.target, Tracker, "track._target_")
    try:
        if track.kind == "tensorboard":
            from lowrank.track.tensorboard import TensorBoard

            return TensorBoard
        from lowrank.track.wandb import WeightsAndBiases

        return WeightsAndBiases
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"track.kind: '{track.kind}' needs a package that is not installed ({error.name}): "
            f"pip install 'lowrank[{track.kind}]'"
        ) from error


def complain(kind: str, error: BaseException) -> None:
    told = redacted(f"track: {kind} failed ({type(error).__name__}: {error}); the run goes on.")
    print(told, file=sys.stderr, flush=True)
