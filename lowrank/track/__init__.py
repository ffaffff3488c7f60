"""Sending a run's figures to a tracker as they come; ``metrics.jsonl`` holds them whatever happens here.

A tracker only observes: one that fails says so once on standard error, and the run goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from lowrank.errors import ConfigError
from lowrank.schema import Track
from lowrank.secrets import redacted, redacted_tree
from lowrank.train.hooks import Hook, StepRecord


class Writer(Protocol):
    """What a kind of tracker has to do."""

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class Tracker(Hook):
    """Gives each step and each evaluation to a writer under ``train/…`` and ``eval/…``."""

    def __init__(self, kind: str, writer: Writer) -> None:
        self.kind, self.writer, self.failed = kind, writer, False

    def after_step(self, record: StepRecord) -> None:
        values = {name: value for name, value in vars(record).items() if name != "step"}
        self.attempt(lambda: self.writer.log(record.step, {f"train/{k}": v for k, v in values.items()}))

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.attempt(lambda: self.writer.log(step, {f"eval/{k}": v for k, v in metrics.items()}))

    def close(self) -> None:
        self.attempt(self.writer.close)

    def attempt(self, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:  # a tracker's own trouble, of whatever kind
            if not self.failed:
                complain(self.kind, error)
            self.failed = True


def tracker(track: Track, folder: Path, config: dict[str, Any]) -> Tracker | None:
    """The hook for ``track.kind``, writing to the run directory ``folder``; ``config`` is recorded beside the curves.

    None for ``none``, and for a tracker that cannot start (said on standard error). Raises ConfigError where its
    package is not installed.
    """
    if track.kind == "none":
        return None
    start = writer_class(track.kind)
    name = None if track.name is None else redacted(track.name)
    track = replace(track, project=redacted(track.project), name=name)
    try:
        return Tracker(track.kind, start(track, folder, redacted_tree(config)))
    except Exception as error:  # not logged in, no network, a folder that cannot be written …
        complain(track.kind, error)
        return None


def writer_class(kind: str) -> Callable[[Track, Path, dict[str, Any]], Writer]:
    """The kind's writer, its package imported. Raises ConfigError where that is not installed."""
    try:
        if kind == "tensorboard":
            from lowrank.track.tensorboard import TensorBoard

            return TensorBoard
        from lowrank.track.wandb import WeightsAndBiases

        return WeightsAndBiases
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"track.kind: '{kind}' needs a package that is not installed ({error.name}): pip install 'lowrank[{kind}]'"
        ) from error


def complain(kind: str, error: Exception) -> None:
    told = redacted(f"track: {kind} failed ({type(error).__name__}: {error}); the run goes on.")
    print(told, file=sys.stderr, flush=True)
