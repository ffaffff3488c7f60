"""From a job's start to its first step, in a fresh process and in a worker that holds the base, alternated:
``python -m benchmarks.warm_start --repeats 5 quant=nf4``.

The moment before the first step is when the run opens its metrics.jsonl. Beside the wall's seconds, which a busy
machine stretches, those that the process has computed. Jobs of the worker: ``lr``, which differ from others in the
learning rate alone, and ``rank``, which differ in shape.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank import compose

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("loop.steps=1", "eval.limit=4", "eval.generate.limit=0", "checkpoint.every=0")
TICK = os.sysconf("SC_CLK_TCK")
KINDS = {"lr": ("adapter.r=8", "optim.lr={number}e-5"), "rank": ("adapter.r={number}",)}


@dataclass(frozen=True)
class Start:
    wall: float  # seconds
    computed: float  # of all of the process's threads


def computed(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def watched(folder: Path, process: subprocess.Popen[Any], begun: float, before: float) -> Start:
    """Until the run in ``folder`` is about to make its first step."""
    while not (folder / "metrics.jsonl").exists():
        if process.poll() is not None:
            raise SystemExit(f"{folder}: no step was made.")
        time.sleep(0.002)
    return Start(time.perf_counter() - begun, computed(process.pid) - before)


def fresh(folder: Path, overrides: list[str]) -> Start:
    command = [sys.executable, str(ROOT / "train.py"), *overrides, f"hydra.run.dir={folder}"]
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = watched(folder, process, begun, 0.0)
    process.wait()
    return found


class Worker:
    def __init__(self) -> None:
        ours, theirs = os.pipe()
        command = [sys.executable, "-m", "lowrank.sweep.worker", str(theirs)]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, pass_fds=(theirs,), **quiet)
        os.close(theirs)
        self.answers = os.fdopen(ours)

    def run(self, folder: Path, overrides: list[str]) -> Start:
        config = compose.compose(overrides).to_dict()
        line = json.dumps({"jobs": [{"config": config, "folder": str(folder), "command": ""}]})
        begun, before = time.perf_counter(), computed(self.process.pid)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()
        found = watched(folder, self.process, begun, before)
        while "idle" not in self.answers.readline():
            pass
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("overrides", nargs="*")
    asked.add_argument("--repeats", type=int, default=5)
    given = asked.parse_args()
    found: dict[str, list[Start]] = {"fresh": [], **{f"resident, another {kind}": [] for kind in KINDS}}
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker()
        for number in range(given.repeats + 1):
            jobs = {
                kind: [*given.overrides, *SHORT, *(k.format(number=number + 1) for k in keys)]
                for kind, keys in KINDS.items()
            }
            starts = {"fresh": fresh(Path(folder, f"fresh-{number}"), jobs["rank"])}
            for kind, overrides in jobs.items():
                starts[f"resident, another {kind}"] = worker.run(Path(folder, f"{kind}-{number}"), overrides)
            if number:  # the first loads the base, and judges it for all that come after
                for name, start in starts.items():
                    found[name].append(start)
                    print(f"{name:<24} {start.wall:6.2f} s, computed {start.computed:5.2f} s", flush=True)
        worker.close()
    for what in ("wall", "computed"):
        medians = {name: statistics.median(getattr(one, what) for one in starts) for name, starts in found.items()}
        shares = ", ".join(f"{name} {m:.2f} s ({m / medians['fresh']:.0%})" for name, m in medians.items())
        print(f"{what}, medians of {given.repeats}: {shares}")


if __name__ == "__main__":
    main()
