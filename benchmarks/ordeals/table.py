"""What the tortures found, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ordeals.arm import Figure, Row

BEGIN, END = "<!-- torture: written by torture.py --write -->", "<!-- /torture -->"
TOLD = 5  # failures of an arm that are shown


def line(row: Row, seconds: float) -> str:
    """A row as soon as it is known, with what did not pass."""
    told = [f"{seconds:6.0f} s  {row.torture}: lowrank {shown(row.ours)}, PEFT + Trainer {shown(row.peer)}"]
    for name, figure in (("lowrank", row.ours), ("PEFT + Trainer", row.peer)):
        told += [f"          {name}: {fault[:300]}" for fault in (figure.failures if figure else [])[:TOLD]]
    return "\n".join(told)


def shown(figure: Figure | None) -> str:
    return "–" if figure is None else str(figure)


def markdown(rows: Sequence[Row], about: Mapping[str, str]) -> str:
    cells = [("passed", "lowrank", "PEFT + Trainer"), ("---", "---:", "---:")]
    cells += [(row.torture, shown(row.ours), shown(row.peer)) for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    notes = [f"- {about['machine']}; {about['versions']}; {about['minutes']} minutes.", f"- `{about['command']}`"]
    return "\n".join([*lines, "", *failures(rows), *notes])


def failures(rows: Sequence[Row]) -> list[str]:
    """Ours are listed: each names what makes it again."""
    return [f"- lowrank failed: {fault[:300]}" for row in rows if row.ours for fault in row.ours.failures[:TOLD]]


def write(folder: Path, found: str, rows: Sequence[Row]) -> None:
    """All that did not pass as JSON, and the table between the marks of README.md."""
    (folder / "torture.json").write_text(
        json.dumps([told(row) for row in rows], indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    readme = folder / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{readme}: no place for the table: {BEGIN} … {END}")
    readme.write_text(f"{before}{begin}\n{found}\n{end}{after}", encoding="utf-8")


def told(row: Row) -> dict[str, Any]:
    arms = {"lowrank": row.ours, "peft": row.peer}
    figures = {
        name: {"total": figure.total, "passed": figure.passed, "failures": figure.failures[:100]}
        for name, figure in arms.items()
        if figure is not None
    }
    return {"torture": row.torture, **figures}
