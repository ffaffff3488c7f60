"""A run's first steps once more, from its configuration alone: are they what the run recorded, every bit?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lowrank import run as runs
from lowrank.commands.continued import configuration
from lowrank.errors import NumericsError, RefusedError
from lowrank.manifest import newest
from lowrank.record import directory
from lowrank.record.directory import Log
from lowrank.schema import Config, Track
from lowrank.session.identity import LENGTH, differences, recorded
from lowrank.session.session import Session
from lowrank.train.checkpoint import read_state
from lowrank.train.digests import FIRST, unequal
from lowrank.train.metrics import read
from lowrank.train.stopping import Stopping

COMPARED = ("loss", "grad_norm", "lr", "target_tokens", "real_tokens")


@dataclass(frozen=True)
class Course:
    """What a run directory tells of its steps: rows of metrics.jsonl and of digests.jsonl, by step."""

    metrics: dict[int, dict[str, Any]]
    digests: dict[int, dict[str, Any]]

    @classmethod
    def of(cls, folder: Path, last: int) -> Course:
        steps = [row for row in read(folder / directory.METRICS) if row["event"] == "step"]
        return cls(
            {row["step"]: row for row in steps if row["step"] <= last},
            {row["step"]: row for row in read(folder / directory.DIGESTS) if row["step"] <= last},
        )


@dataclass(frozen=True)
class Replay:
    """What came of it. ``changed`` are the fields of the run's identity that are no longer what they were."""

    steps: int
    tensors: int
    digests: int  # steps at which the tensors were compared
    changed: dict[str, str] | None  # None: the run does not tell
    difference: str  # the first one; empty where there is none

    @property
    def equal(self) -> bool:
        return not self.difference

    def __str__(self) -> str:
        if self.changed is None:
            identity = "the run's identity is not recorded"
        elif self.changed:
            identity = "since the run: " + "; ".join(f"{name} {how}" for name, how in self.changed.items())
        else:
            identity = "identity: as recorded"
        at = f"{self.digests} step" + ("s" if self.digests != 1 else "")
        equal = f"losses, gradient norms and {self.tensors} tensors at {at} are bitwise equal"
        return f"{identity}\n{self.steps} steps replayed: {self.difference or equal}"


def replay(folder: Path, steps: int = FIRST) -> Replay:
    """Trains the run's first ``steps``, or as many as it has made, in a temporary directory.

    Raises RefusedError where the run has recorded no step to compare with.
    """
    _, told = recorded(folder)
    config = configuration(folder, told, [], "replay")
    then = Course.of(folder, steps)
    if not then.metrics or not then.digests:
        missing = directory.DIGESTS if then.metrics else directory.METRICS
        raise RefusedError(
            f"{folder / missing}: tells of no step, so there is nothing to compare with. "
            f"A run writes it from its first step on."
        )
    config, log, failed = first_steps_of(config, then.digests.get(0, {})), Log(), ""
    with TemporaryDirectory(prefix="lowrank-replay-") as temporary, Stopping().installed() as stopping:
        parts, data, loaded = runs.assembled(config, log)
        session = Session(parts, data, loaded, Path(temporary), log, None, stopping)
        changed = since(identity_of(folder), session.identity)
        try:
            session.first_steps(max(then.metrics))
        except NumericsError as error:
            failed = str(error)
        now = Course.of(Path(temporary), steps)
    difference = first_difference(then, now)
    if failed:
        difference = f"{difference}: {failed}" if difference else failed
    both = [step for step in then.digests if step and step in now.digests]
    return Replay(len(now.metrics), len(session.loop.parameters), len(both), changed, difference)


def first_steps_of(config: Config, start: Mapping[str, Any]) -> Config:
    """Without what only looks or ends a run; with the schedule's length of its start: it may have been extended."""
    loop = replace(config.loop, max_seconds=None, patience=None, prune=None, diverged=None, profile=None)
    if "steps" in start:
        loop = replace(loop, steps=start["steps"], epochs=None)
    return replace(
        config,
        loop=loop,
        eval=replace(config.eval, before=False, every=0),
        checkpoint=replace(config.checkpoint, every=0, resume=False, allow=[], background=False),
        track=Track(kind="none"),
    )


def identity_of(folder: Path) -> dict[str, Any]:
    """As the run wrote it down or, where it did not, as its newest checkpoint has it; empty where there is neither."""
    identity, _ = recorded(folder)
    path, _ = newest(folder / directory.CHECKPOINTS)
    return identity or (read_state(path)["identity"] if path else {})


def since(then: dict[str, Any], now: dict[str, Any]) -> dict[str, str] | None:
    changed = differences(then, now)
    return {name: how for name, how in changed.items() if name not in LENGTH} if then else None


def first_difference(then: Course, now: Course) -> str:
    """``step 7: model.layers.0…A differs``, or the figure of metrics.jsonl that does; empty where nothing does."""
    for step in sorted({0, *then.metrics}):
        if step and step not in now.metrics:
            return f"step {step} was not reached"
        for name in COMPARED if step else ():
            old, new = then.metrics[step][name], now.metrics[step][name]
            if old != new:
                return f"step {step}: {name} differs ({old!r} → {new!r})"
        if step in then.digests and step in now.digests:
            tensor = unequal(then.digests[step], now.digests[step])
            if tensor is not None:
                return f"step {step}: {tensor} differs{'' if step else ' before training'}"
    return ""
