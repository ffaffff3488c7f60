"""A run in a second instead of six: a process that has imported everything is forked once for each point.

It must not have run a torch operation itself: a fork after torch has run deadlocks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Point = TypeVar("Point")
SECONDS = 120.0  # after which a child is taken to hang


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or the signal's number below 0, and all that it printed."""

    code: int
    output: str

    @property
    def last(self) -> str:
        """The last line that it printed, for a report."""
        lines = self.output.strip().splitlines()
        return lines[-1][:200] if lines else ""


def child(act: Callable[[], Any], seconds: float = SECONDS) -> Ended:
    """Runs ``act`` in a forked process and waits for it."""
    with tempfile.TemporaryFile() as output:
        number = fork(act, output.fileno())
        code = waited(number, time.monotonic() + seconds)
        output.seek(0)
        return Ended(code, output.read().decode(errors="replace"))


def control(act: Callable[[], Any], otherwise: str) -> None:
    """Runs what must end well for a figure to mean anything. Raises SystemExit, with its output, where it does not."""
    ended = child(act)
    if ended.code:
        raise SystemExit(f"{otherwise}:\n{ended.output}")


def fork(act: Callable[[], Any], output: int) -> int:
    """The number of a new process that does ``act`` and ends as a program that did would."""
    sys.stdout.flush()
    sys.stderr.flush()
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        act()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def waited(number: int, until: float) -> int:
    """The exit code of a child, which is killed where it does not end in time."""
    while True:
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            raise TimeoutError(f"process {number} did not end in time")
        time.sleep(0.002)


def value(act: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What ``act`` returns, as JSON, out of a forked process. RuntimeError, with what it printed, where it fails."""
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        ended = child(lambda: path.write_text(json.dumps(act())), seconds)
        if ended.code:
            raise RuntimeError(f"exit code {ended.code}:\n{ended.output}")
        return json.loads(path.read_text())


def each(
    points: Iterable[Point], act: Callable[[Point], Any], at_once: int, seconds: float = 6 * SECONDS
) -> Iterator[tuple[Point, Any]]:
    """``act(point)`` for every point, each in a forked process, which may fork further ones; in their order."""
    running: list[tuple[int, Point, int]] = []
    with tempfile.TemporaryDirectory(prefix="torture-results-") as name:
        try:
            for index, point in enumerate(points):
                running.append((index, point, begun(act, point, Path(name) / str(index))))
                if len(running) >= at_once:
                    yield finished(*running.pop(0), Path(name), seconds)
            while running:
                yield finished(*running.pop(0), Path(name), seconds)
        finally:  # whoever asked may want no more of them
            for _, _, number in running:
                waited(number, time.monotonic() + seconds)


def begun(act: Callable[[Point], Any], point: Point, path: Path) -> int:
    with path.with_suffix(".log").open("wb") as log:
        return fork(lambda: path.write_text(json.dumps(act(point))), log.fileno())


def finished(index: int, point: Point, number: int, folder: Path, seconds: float) -> tuple[Point, Any]:
    code = waited(number, time.monotonic() + seconds)
    if code:
        log = (folder / f"{index}.log").read_text(errors="replace")
        raise RuntimeError(f"{point}: the torture itself failed with exit code {code}:\n{log}")
    return point, json.loads((folder / str(index)).read_text())
