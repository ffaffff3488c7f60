"""A run directory as it lies on the disk: any file may be missing, torn, or still being written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.report.figures import clean, mapping, number

TEXTS = ("config.yaml", "plan.txt", "events.log")


@dataclass(frozen=True)
class Recorded:
    folder: Path
    summary: dict[str, Any]  # summary.json, completed from the metrics where the run was cut short
    steps: list[dict[str, Any]]  # one a step, ascending
    evals: list[dict[str, Any]]  # one a held-out evaluation, ascending by step
    samples: list[dict[str, Any]]
    texts: dict[str, str]  # of TEXTS, those that are there
    unread: list[str]  # sentences about what could not be read
    ranks: list[dict[str, Any]]  # the rows of a method whose ranks move, as they were written
    spectra: dict[str, Any]  # spectra.json
    profile: dict[str, Any]  # profile/shares.json
    ledger: dict[str, Any]  # ledger.json
    data: dict[str, Any]  # data.json
    identity: dict[str, Any]  # identity.json
    patched: bool  # code.patch is there

    @property
    def processes(self) -> list[dict[str, Any]]:
        """What each process of the run told of itself, the first first."""
        earlier = self.identity.get("earlier")
        told = [*(earlier if isinstance(earlier, list) else []), self.identity.get("provenance")]
        return [found for one in told if (found := mapping(one))]

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one field of the step rows; a value that is there but not finite is nan."""
        rows = [row for row in self.steps if row.get(name) is not None]
        values = [number(row[name]) for row in rows]
        return [row["step"] for row in rows], [float("nan") if v is None else v for v in values]


def read(folder: Path) -> Recorded:
    """What ``folder`` holds, never an error about its content."""
    unread: list[str] = []
    rows = _lines(folder / "metrics.jsonl", unread)
    steps = _by_step(row for row in rows if row.get("event") == "step")
    evals = _by_step(row for row in rows if row.get("event") == "eval")
    ranks = [row for row in rows if row.get("event") == "ranks"]
    texts = {name: clean(text) for name in TEXTS if (text := _text(folder / name))}
    summary = _completed(_mapping(folder / "summary.json", unread), steps, evals)
    spectra = _mapping(folder / "spectra.json", unread)
    profile = _mapping(folder / "profile" / "shares.json", unread)
    ledger = _mapping(folder / "ledger.json", unread)
    data, identity = (_mapping(folder / name, unread) for name in ("data.json", "identity.json"))
    samples = _lines(folder / "samples.jsonl", unread)
    return Recorded(
        folder=folder,
        summary=summary,
        steps=steps,
        evals=evals,
        samples=samples,
        texts=texts,
        unread=unread,
        ranks=ranks,
        spectra=spectra,
        profile=profile,
        ledger=ledger,
        data=data,
        identity=identity,
        patched=(folder / "code.patch").is_file(),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _json(text: str) -> Any:
    """What ``text`` says, or None where it is no JSON (a nesting too deep for the parser included)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _mapping(path: Path, unread: list[str]) -> dict[str, Any]:
    text = _text(path)
    found = _json(text)
    if text and not isinstance(found, dict):
        unread.append(f"{path.name} could not be read.")
    return mapping(found)


def _lines(path: Path, unread: list[str]) -> list[dict[str, Any]]:
    texts = [line for line in _text(path).split("\n") if line.strip()]
    rows = [found for line in texts if isinstance(found := _json(line), dict)]
    if lost := len(texts) - len(rows):
        unread.append(f"{lost} of {len(texts)} lines of {path.name} could not be read.")
    return rows


def _by_step(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ascending by step; of a step written twice (a resumed run) the later row."""
    latest = {step: row for row in rows if (step := number(row.get("step"))) is not None}
    return [latest[step] for step in sorted(latest)]


def _completed(summary: dict[str, Any], steps: list[dict[str, Any]], evals: list[dict[str, Any]]) -> dict[str, Any]:
    """``summary`` with what a run cut short could not write, as far as its metrics know it."""
    seconds, tokens = _sum(steps, "seconds"), _sum(steps, "real_tokens")
    known = {
        "status": "unfinished",
        "steps": steps[-1]["step"] if steps else None,
        "seconds": seconds,
        "real_tokens": tokens,
        "tokens_per_s": tokens / seconds if tokens and seconds else None,
        "peak_memory_mb": max((m for row in steps if (m := number(row.get("peak_memory_mb")))), default=None),
    }
    before = next((row for row in evals if row["step"] == 0), None)
    after = next((row for row in reversed(evals) if row["step"] > 0), None)
    given = mapping(summary.get("eval"))
    both = {"before": given.get("before") or before, "after": given.get("after") or after}
    return known | {name: value for name, value in summary.items() if value is not None} | {"eval": both}


def _sum(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [value for row in rows if (value := number(row.get(name))) is not None]
    return sum(values) if values else None
