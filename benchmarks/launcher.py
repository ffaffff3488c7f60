"""What a job costs in a sweep beyond the same run by itself, on a tiny model: `python benchmarks/launcher.py`.

A sweep of few jobs and one of more, one job at a time, beside plain runs, in turns: their difference is the jobs', what
is left the sweep's own start. Medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the one above it

from benchmarks.ordeals.ground import write_rows  # noqa: E402

FEW, MORE = 1, 5
JOB = (
    *("model=tiny_llama", "data=jsonl", "data.fields.response=output", "data.max_length=64", "loop.micro_batch=2"),
    *("loop.device=cpu", "loop.precision=fp32", "loop.steps=4", "eval.limit=2", "eval.generate.limit=0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a job costs in a sweep beyond the same run by itself.")
    parser.add_argument("--times", type=int, default=5, help="turns (5)")
    times = parser.parse_args().times
    with TemporaryDirectory(prefix="launcher-") as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl")
        took(folder, "warm", ())
        turns = [
            [
                took(folder, f"plain{turn}", ()),
                took(folder, f"few{turn}", range(FEW)),
                took(folder, f"more{turn}", range(MORE)),
            ]
            for turn in range(times)
        ]
    for kind, unit in enumerate(("seconds of wall clock", "seconds of processors")):
        told([[run[kind] for run in turn] for turn in turns], unit)


def told(turns: list[list[float]], unit: str) -> None:
    """``turns``: of each a plain run, a sweep of few jobs and one of more."""
    plain, few, more = (statistics.median(column) for column in zip(*turns, strict=True))
    extra = [(m - f) / (MORE - FEW) - p for p, f, m in turns]
    print(f"{unit}, medians of {len(turns)}: a plain run {plain:.2f}; a sweep of {FEW} {few:.2f}, of {MORE} {more:.2f}")
    each = ", ".join(f"{one:+.2f}" for one in extra)
    print(f"  a job in a sweep beyond a plain run: {statistics.median(extra):+.2f} ({each})")
    print(f"  a sweep's own start, once: {statistics.median(f - p for p, f, _ in turns):+.2f}")


def took(folder: Path, name: str, seeds: range | tuple[()]) -> tuple[float, float]:
    """Seconds of a plain run, or of a sweep over ``seeds``: of wall clock, and of processors."""
    command, data = [sys.executable, str(ROOT / "train.py")], f"data.path={folder / 'rows.jsonl'}"
    if seeds:
        sweep = ["-m", f"hydra.sweep.dir={folder / name}", "hydra.launcher.n_jobs=1"]
        command += [*sweep, *JOB, data, f"loop.seed={','.join(map(str, seeds))}"]
    else:
        command += [*JOB, data, f"hydra.run.dir={folder / name}"]
    started, before = time.perf_counter(), os.times()
    variables = {**os.environ, "LOWRANK_CACHE": str(folder / "cache")}
    subprocess.run(command, check=True, capture_output=True, env=variables, cwd=ROOT)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, used


if __name__ == "__main__":
    main()
