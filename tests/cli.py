"""Running lowrank as a user does: on a few rows, a tiny model, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# A few seconds of work in milliseconds: eighteen rows to train on, two held out, texts of four tokens.
SMALL = (
    *("data=jsonl", "data.fields.response=output", "loop.micro_batch=2", "loop.device=cpu", "loop.precision=fp32"),
    *("eval.generate.limit=2", "eval.generate.max_new_tokens=4"),
)


def write_rows(path: Path, count: int = 20) -> Path:
    """``count`` instructions, every third with an input, as jsonl."""
    rows = [
        {"instruction": f"Say number {i}.", "input": f"list {i}" if i % 3 == 0 else "", "output": f"{i}, or {i + 1}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def environment(**more: str) -> dict[str, str]:
    """Of a child whose arithmetic must be this process's: the same number of threads; no hub, no debugging."""
    kept = {name: value for name, value in os.environ.items() if name != "LOWRANK_DEBUG"}
    return {**kept, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1", **more}


def run(
    *command: str, cwd: Path | None = None, stdin: str | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=environment(**more),
        cwd=cwd or ROOT,
        input=stdin,
        check=False,
        timeout=300,
    )


def train(*arguments: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """``python train.py …``"""
    return run(str(ROOT / "train.py"), *arguments, cwd=cwd, **more)


def lowrank(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """``lowrank …``"""
    return run("-m", "lowrank.cli", *arguments, stdin=stdin)
