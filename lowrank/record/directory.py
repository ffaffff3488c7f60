"""A run's directory: the names of its files, writing them whole, and its log."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from lowrank import foreign
from lowrank.disk import write_text
from lowrank.secrets import redacted, redacted_tree

CONFIG, PLAN, PLAN_JSON = "config.yaml", "plan.txt", "plan.json"
METRICS, DIGESTS, EVENTS = "metrics.jsonl", "digests.jsonl", "events.log"
SAMPLES, SUMMARY, REPORT = "samples.jsonl", "summary.json", "report.html"
DATA, SPECTRA, LEDGER = "data.json", "spectra.json", "ledger.json"
CHECKPOINTS, ADAPTER = "checkpoints", "adapter"
IDENTITY, PATCH = "identity.json", "code.patch"
PROFILE = "profile"
# Any of these makes a directory a run's.
RUN = (CONFIG, PLAN, PLAN_JSON, IDENTITY, EVENTS, METRICS, DIGESTS, CHECKPOINTS, ADAPTER, SUMMARY)


def json_line(value: Any) -> str:
    return json.dumps(redacted_tree(finite(value)), ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(redacted_tree(finite(value)), indent=2, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """The same with null for every number that is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no file. Raises RefusedError where it holds no JSON object that could be one of ours."""
    if not path.exists():
        return {}
    return foreign.read_json(path.parent, path.name)


class Log:
    """``events.log``, and the same lines on standard error. Before the directory exists lines wait."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.waiting: list[str] = []

    def say(self, text: str) -> None:
        print(redacted(text), file=sys.stderr, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """In the file alone."""
        self.waiting.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {redacted(text)}\n")
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(self.waiting)
            self.waiting.clear()

    def open(self, folder: Path) -> None:
        self.path = folder / EVENTS
        self.note(f"opened by process {os.getpid()}")
