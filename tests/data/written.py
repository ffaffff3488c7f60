"""Data files written for a test, and the settings that read them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lowrank.data import sources
from lowrank.errors import DataError, LowrankError


@dataclass(frozen=True)
class Fields:
    instruction: str | None = "instruction"
    input: str | None = "input"
    response: str | None = "output"
    text: str | None = "text"


@dataclass(frozen=True)
class Settings:
    kind: str = "jsonl"
    path: str | None = None
    eval_path: str | None = None
    eval_fraction: float = 0.1
    fields: Fields = field(default_factory=Fields)
    template: str = "instruction"
    on_malformed: str = "error"
    limit: int | None = None
    seed: int = 0


def row(number: int) -> dict[str, object]:
    return {"instruction": f"ask {number}", "input": f"about {number}", "output": f"answer {number}"}


def jsonl(path: Path, rows: list[object]) -> Settings:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Settings(path=str(path))


def written(path: Path, content: str | bytes, kind: str = "jsonl") -> Settings:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Settings(kind=kind, path=str(path))


def refused(settings: Settings, error: type[LowrankError] = DataError) -> str:
    with pytest.raises(error) as caught:
        sources.load(settings)
    return str(caught.value)
