"""``metrics.jsonl``: one JSON object a line, flushed at each, cut back to a checkpoint's place on resume."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank.train.hooks import Hook, StepRecord


class Metrics(Hook):
    """Appends rows to a file; a number that is not finite is written as null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("ab")

    def write(self, row: dict[str, Any]) -> None:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.file.write((json.dumps(plain, ensure_ascii=False) + "\n").encode())
        self.file.flush()

    def after_step(self, record: StepRecord) -> None:
        self.write(record.to_dict())

    def position(self) -> int:
        """Bytes written: a checkpoint keeps it, so that a resumed run neither repeats nor drops a row."""
        return self.file.tell()

    def cut(self, position: int) -> None:
        self.file.truncate(position)
        self.file.seek(position)

    def close(self) -> None:
        self.file.close()


class MethodEvents(Hook):
    """Writes what a method's hook tells of a step: ``event(step)``, where it has one, gives a row or None.

    A row is a function of the run alone, so that a resumed one writes again what its cut took away.
    """

    def __init__(self, methods: Sequence[Any], metrics: Metrics) -> None:
        self.methods, self.metrics = methods, metrics

    def after_step(self, record: StepRecord) -> None:
        for method in self.methods:
            told = method.event(record.step) if hasattr(method, "event") else None
            if told is not None:
                self.metrics.write({"event": told["event"], "step": record.step, **told})


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole row of a metrics file; a last line that a crash tore is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]
