"""``metrics.jsonl`` and its kind: one JSON object a line, cut back to a checkpoint's place on resume."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowrank.disk import Written, starts_as
from lowrank.errors import RefusedError
from lowrank.train.finite import Fault
from lowrank.train.hooks import Hook, StepRecord

Place = Mapping[str, Any]  # {"bytes", "sha256"} of all that a file held when a checkpoint was made


class Lines:
    """Appends rows to a file; each is with the system when ``write`` returns, so that only a crash of the machine can
    tear one. A number that is not finite is written as null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("a+b", buffering=0)
        self.file.seek(0)
        self.seen = hashlib.file_digest(self.file, "sha256")
        self.bytes = self.file.tell()

    def write(self, row: Mapping[str, Any]) -> None:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        left = memoryview((json.dumps(plain, ensure_ascii=False) + "\n").encode())
        while left:
            count = os.write(self.file.fileno(), left)
            self.seen.update(left[:count])
            self.bytes, left = self.bytes + count, left[count:]

    def place(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run neither repeats nor drops a row."""
        return asdict(Written(self.bytes, self.seen.hexdigest()))

    def cut(self, place: Place | None) -> None:
        """Back to where a checkpoint was made, or to nothing. Raises RefusedError as ``refuse_changed`` does."""
        if place is not None:
            refuse_changed(self.path, place)
        self.file.truncate(place["bytes"] if place is not None else 0)
        self.file.seek(0)
        self.seen = hashlib.file_digest(self.file, "sha256")
        self.bytes = self.file.tell()

    def close(self) -> None:
        self.file.close()


def refuse_changed(path: Path, place: Place) -> None:
    """Raises RefusedError where a file does not begin with what it held at a checkpoint: a run that went on after it
    would tell of steps that were not its own."""
    if not starts_as(path, Written(**place)):
        raise RefusedError(
            f"{path}: its first {place['bytes']:,} bytes are not those that the checkpoint was made after. "
            "Put the file back as it was, or train anew in another directory."
        )


class Metrics(Lines, Hook):
    """A row for each step, and whatever others write between."""

    def after_step(self, record: StepRecord) -> None:
        self.write(record.to_dict())

    def after_skip(self, fault: Fault) -> None:
        self.write(fault.to_dict())


class MethodEvents(Hook):
    """Writes what a method's hook tells of a step: ``event(step)``, where it has one, gives a row or None.

    A row is a function of the run alone, so that a resumed one writes again what its cut took away.
    """

    def __init__(self, methods: Sequence[Any], metrics: Lines) -> None:
        self.methods, self.metrics = methods, metrics

    def after_step(self, record: StepRecord) -> None:
        for method in self.methods:
            told = method.event(record.step) if hasattr(method, "event") else None
            if told is not None:
                self.metrics.write({"event": told["event"], "step": record.step, **told})


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole row of a file; a last line that a crash tore is left out. Raises RefusedError, naming the line, where
    another one is no row."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [row(path, number, line) for number, line in enumerate(lines[:-1], 1) if line]


def row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RefusedError(f"{path}:{number}: cannot be read: not a JSON object.")
    return found
