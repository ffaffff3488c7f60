"""Where the tortures take place: folders, data and models that are prepared once, and how children are started."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.ordeals import calls, forks
from benchmarks.ordeals.arm import EVERY, STEPS, Arm, Figure, Place
from benchmarks.ordeals.calls import KILL, Calls
from benchmarks.ordeals.ours import Ours
from lowrank.models import tiny

Point = TypeVar("Point")


@dataclass(frozen=True)
class Ground:
    folder: Path  # empty at first; what a point makes there is removed when it is judged
    ours: Ours
    base: Path  # the tiny model's folder
    peer: Any  # benchmarks.ordeals.peer.Peer, or None where it is left out
    calls: Callable[[], Calls]
    at_once: int  # children
    seed: int

    @property
    def arms(self) -> list[Arm]:
        return [self.ours, *([self.peer] if self.peer is not None else [])]

    def run(self, name: str, arm: Arm) -> Path:
        """A run that nothing disturbs, made when first asked for."""
        folder = self.folder / f"{name}-{arm.name.partition(' ')[0]}"
        if not folder.is_dir():
            forks.control(lambda: arm.program(folder), f"{arm.name}: a run that nothing disturbs fails")
        return folder

    def stopped(self, arm: Arm, name: str = "stopped") -> Path:
        """A run that died in its last save: every checkpoint but that one is there, and nothing of its end."""
        folder = self.folder / f"{name}-{arm.name.partition(' ')[0]}"
        if not folder.is_dir():
            ended = forks.child(lambda: dying(self.calls(), arm, folder))
            if ended.code != -signal.SIGKILL:
                raise SystemExit(f"{arm.name}: a run that was to be killed was not:\n{ended.output}")
        return folder

    def goes_on(self, arm: Arm, stopped: Path) -> None:
        """Where nothing has changed: without that a refusal would mean nothing."""
        folder = self.copy(stopped, f"{arm.name[:4]} nothing changed")
        forks.control(lambda: arm.again(folder), f"{arm.name}: nothing has changed, and yet it does not go on")

    def copy(self, folder: Path, name: str) -> Path:
        return shutil.copytree(folder, self.place(name), symlinks=True)

    def place(self, name: str) -> Path:
        """The folder of one point, which ``name`` tells from the others."""
        folder = self.folder / "points" / re.sub(r"[^\w.-]+", "-", name)
        folder.parent.mkdir(exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        return folder

    def judged(self, points: Iterable[Point], judge: Callable[[Point], str]) -> Figure:
        """``judge(point)`` says what is wrong, or nothing; each in a forked process."""
        found = list(self.each(points, judge))
        return Figure(len(found), [f"{point}: {fault}" for point, fault in found if fault])

    def each(self, points: Iterable[Point], act: Callable[[Point], Any]) -> Iterator[tuple[Point, Any]]:
        return forks.each(points, act, self.at_once)


def dying(calls: Calls, arm: Arm, folder: Path) -> None:
    place = replace(arm.places[1], nth=STEPS // EVERY)
    with inside(place, calls, KILL, 1):
        arm.keeping().program(folder)


@contextmanager
def inside(place: Place, calls: Calls, what: int, number: int, told: Callable[[int], Any] = int) -> Iterator[None]:
    """In this process calls are counted while that part of a run lasts. A disk that is full stays so."""
    real, begun = getattr(place.owner, place.function), [0]

    @wraps(real)
    def watched(*arguments: Any, **more: Any) -> Any:
        begun[0] += 1
        if begun[0] != place.nth:
            return real(*arguments, **more)
        calls.arm(what, number)
        found = real(*arguments, **more)
        told(calls.disarm())
        return found

    setattr(place.owner, place.function, watched)
    try:
        yield
    finally:
        setattr(place.owner, place.function, real)


def make(folder: Path, *, peer: bool, native: bool, at_once: int, seed: int) -> Ground:
    data = write_rows(folder / "data.jsonl")
    base = Path(forks.value(lambda: str(tiny.folder("tiny_llama"))))
    theirs = None
    if peer:
        from benchmarks.ordeals.peer import Peer

        theirs = Peer(base, data)
    counting = partial(calls.Native, calls.build(folder)) if native else calls.Patched
    return Ground(folder, Ours(data), base, theirs, counting, at_once, seed)


def write_rows(path: Path, count: int = 20) -> Path:
    """``count`` short instructions as jsonl."""

    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}, or {i + 1}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
