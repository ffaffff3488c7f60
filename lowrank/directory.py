"""A run's directory: the names of its files, writing them whole, its log, and the one process that owns it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank.disk import write_text
from lowrank.errors import RefusedError

CONFIG, PLAN, PLAN_JSON = "config.yaml", "plan.txt", "plan.json"
METRICS, EVENTS = "metrics.jsonl", "events.log"
SAMPLES, SUMMARY, REPORT = "samples.jsonl", "summary.json", "report.html"
SPECTRA = "spectra.json"
CHECKPOINTS, ADAPTER, LOCK = "checkpoints", "adapter", ".lock"


def json_line(value: Any) -> str:
    return json.dumps(finite(value), ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """The same with null for every number that is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no file. Raises RefusedError where it holds no JSON object."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RefusedError(f"{path}: cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise RefusedError(f"{path}: cannot be read: not a JSON object.")
    return found


class Log:
    """``events.log``, and the same lines on standard error. Before the directory exists lines wait."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.waiting: list[str] = []

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """In the file alone."""
        self.waiting.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(self.waiting)
            self.waiting.clear()

    def open(self, folder: Path) -> None:
        self.path = folder / EVENTS
        self.note(f"opened by process {os.getpid()}")


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Makes the directory this process's own; the kernel lets go of the lock when the process ends, however it ends.

    Raises RefusedError with the owner's process number where another has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise RefusedError(f"{folder}: in use by process {owner}.") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [LOCK]:  # nothing was trained, nothing is left
                (folder / LOCK).unlink()
                folder.rmdir()
