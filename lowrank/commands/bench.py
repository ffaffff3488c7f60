"""``lowrank bench``: how fast a configuration trains and in how much memory, each time in a process of its own.

With ``against`` two configurations alternate, A B, B A, A B …, so that what slows the machine slows both; what is
told is the ratio of neighbours and its spread. Loads no torch itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lowrank import compose
from lowrank.errors import ConfigError, LowrankError

ROOT = Path(__file__).resolve().parents[2]  # from where this lowrank is imported, and so the child's


def measuring(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", help="as for train.py")
    command.add_argument("--steps", type=int, default=10, help="steps that count (10)")
    command.add_argument("--warmup", type=int, default=3, help="steps before them (3)")
    command.add_argument("--repeats", type=int, default=1, help="processes (1); with --against, pairs of them")
    command.add_argument("--against", metavar="OVERRIDES", help="a second point: overrides besides, or instead, in one")
    command.add_argument("--out", type=Path, default=Path("bench.jsonl"), help="rows are added to it (bench.jsonl)")


def bench(arguments: argparse.Namespace) -> None:
    names = ("overrides", "steps", "warmup", "repeats", "out")
    against = None if arguments.against is None else shlex.split(arguments.against)
    for line in Bench(against=against, **{name: getattr(arguments, name) for name in names}).run():
        print(line, flush=True)


@dataclass(frozen=True)
class Bench:
    """What is to be measured: ``overrides``, and where there is an ``against``, that beside it."""

    overrides: Sequence[str]
    against: Sequence[str] | None = None  # overrides that the other point has besides, or instead
    steps: int = 10
    warmup: int = 3
    repeats: int = 1
    out: Path = Path("bench.jsonl")

    @property
    def points(self) -> dict[str, list[str]]:
        others = {} if self.against is None else {"B": beside(self.overrides, self.against)}
        return {"A": list(self.overrides), **others}

    @property
    def command(self) -> str:
        told = {"steps": self.steps, "warmup": self.warmup, "repeats": self.repeats, "out": self.out}
        words = ["lowrank", "bench", *self.overrides, *(f"--{name}={value}" for name, value in told.items())]
        return shlex.join([*words, *([] if self.against is None else ["--against", shlex.join(self.against)])])

    def run(self) -> Iterator[str]:
        """A line for each point when it is measured, and one for the comparison. Raises ConfigError before anything
        is started, and the point's own error where one fails."""
        for name in ("steps", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}: {getattr(self, name)} is not allowed; a positive integer.")
        if self.warmup < 0:
            raise ConfigError(f"--warmup: {self.warmup} is not allowed; an integer, 0 or more.")
        for overrides in self.points.values():
            compose.compose(overrides)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in self.points}
        for repeat in range(1, self.repeats + 1):
            names = list(self.points) if repeat % 2 else list(reversed(self.points))
            for name in names:
                row = point(self.points[name], self.steps, self.warmup)
                rows[name].append(row)
                append(self.out, {**row, "point": name, "repeat": repeat, "command": self.command})
                yield f"{name}  {told(row)}"
        if self.against is not None:
            yield compared(rows["A"], rows["B"])


def point(overrides: Sequence[str], steps: int = 10, warmup: int = 3) -> dict[str, Any]:
    """One point, in a fresh process: ``warmup`` steps that are not counted and ``steps`` that are, no evaluation, no
    checkpoint. Raises the error that the process ended with."""
    with TemporaryDirectory(prefix="lowrank-bench-") as folder:
        answer, cause = Path(folder) / "row.json", Path(folder) / "cause"
        asked = {"overrides": [*overrides], "steps": steps, "warmup": warmup, "answer": str(answer)}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        begun = time.time()
        done = subprocess.run(
            [sys.executable, "-m", "lowrank.commands.point", json.dumps({**asked, "started": begun})],
            env={**os.environ, "PYTHONPATH": path, "LOWRANK_CAUSE": str(cause)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise failed(done, cause.read_text(encoding="utf-8") if cause.exists() else "")
        row: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(begun))
    return {"time": when, "overrides": [*overrides], "steps": steps, "warmup": warmup, **row}


def failed(done: subprocess.CompletedProcess[str], cause: str) -> LowrankError:
    """The child's error as ours; that of a bug shows its traceback."""
    kinds = {cls.exit_code: cls for cls in LowrankError.__subclasses__()}
    if done.returncode not in kinds:
        print(done.stderr, end="", file=sys.stderr)
    if done.returncode < 0:
        cause = f"killed by {signal.Signals(-done.returncode).name}"
    return kinds.get(done.returncode, LowrankError)(cause or f"exit {done.returncode}")


def beside(overrides: Sequence[str], changes: Sequence[str]) -> list[str]:
    """``overrides`` with those of the same keys replaced."""
    changed = {key(text) for text in changes}
    return [*(text for text in overrides if key(text) not in changed), *changes]


def key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def told(row: dict[str, Any]) -> str:
    low, high = row["step_s_quartiles"]
    return (
        f"{row['tokens_per_s']:,.0f} tokens/s  {row['step_s']:.3f} s a step ({low:.3f} to {high:.3f})  "
        f"{row['peak_mb']:,.0f} MB  start {row['start_s']:.1f} s  {shlex.join(row['overrides'])}"
    )


def compared(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> str:
    """B's speed and memory in A's, by neighbours: the median, and the extremes of all pairs."""
    ratios = sorted(other["tokens_per_s"] / one["tokens_per_s"] for one, other in zip(a, b, strict=True))
    memory = statistics.median(other["peak_mb"] / one["peak_mb"] for one, other in zip(a, b, strict=True))
    sure = "" if ratios[0] > 1 or ratios[-1] < 1 else "; they cannot be told apart"
    sure = sure if len(ratios) > 1 else "; one pair tells nothing of the spread"
    return (
        f"B has {statistics.median(ratios):.3f} of A's tokens/s ({ratios[0]:.3f} to {ratios[-1]:.3f} in "
        f"{len(ratios)} pairs{sure}) and {memory:.3f} of its peak"
    )
