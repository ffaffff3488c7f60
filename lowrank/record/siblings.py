"""What the other jobs of a sweep have come to: their directories lie beside this one's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lowrank.errors import RefusedError
from lowrank.record import directory

ALIKE = ("data", "tokenizer")  # fields of an identity, and the groups of that name: what a held-out loss is measured on


class Siblings:
    """The finished jobs beside ``folder`` that measure the held-out loss on the same examples: those of a job that is
    still training would make what is found depend on how many train at a time."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], limit: int | None) -> None:
        self.folder, self.known, self.limit = folder, measured_on(identity), limit
        self.losses: dict[Path, list[tuple[int, float]]] = {}  # of those that are finished: read once

    def best(self, step: int) -> list[float]:
        """The lowest held-out loss of each up to ``step``, where it has evaluated by then; a loss that is not finite is
        infinite. A pruned one keeps the best that it had."""
        for path in sorted(self.folder.parent.glob(f"*/{directory.SUMMARY}")):
            if path.parent != self.folder and path.parent not in self.losses:
                self.look(path.parent)
        until = ([loss for at, loss in held if 0 < at <= step] for held in self.losses.values())
        return [min(found) for found in until if found]

    def look(self, job: Path) -> None:
        """Takes a job's losses down if it is done and comparable. What cannot be read is passed over: another job's
        broken file is no reason to end this one."""
        try:
            if directory.read_json(job / directory.SUMMARY).get("status") != "done":
                return
            told = directory.read_json(job / directory.IDENTITY).get("identity")
            settings = yaml.safe_load((job / directory.CONFIG).read_text(encoding="utf-8"))
            alike = isinstance(told, dict) and measured_on(told) == self.known
            if alike and settings["eval"]["limit"] == self.limit:
                self.losses[job] = evaluations(job / directory.METRICS)
        except (RefusedError, OSError, yaml.YAMLError, ValueError, KeyError, TypeError):
            return


def measured_on(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name.partition(".")[0] in ALIKE}


def evaluations(path: Path) -> list[tuple[int, float]]:
    """Step and held-out loss of each evaluation that a metrics.jsonl tells of."""
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return [
        (int(row["step"]), math.inf if row["loss"] is None else float(row["loss"]))
        for row in rows
        if row.get("event") == "eval"
    ]
