"""Torture, in small: the benchmark's own engine, without its compiled part and without the peer, in a fresh process.

It fails, and says which point to repeat, where one of lowrank's does not pass.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from cli import ROOT, environment

FEW = ("kill=3", "tear=2", "full=2", "parts=2", "drift=2", "flips=300", "nonfinite=2", "fuzz=400", "owners=3")
FEW += ("overrides=100",)
MANY = ("kill", "tear=120", "full=120", "signals", "parts", "drift", "flips", "nonfinite", "fuzz", "owners", "sweep=20")
MANY += ("overrides",)


def torture(*parts: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "torture.py"), *parts, "--alone", "--calls", "patched"]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)


def figures(output: str) -> list[tuple[int, int]]:
    """(passed, of how many), row by row."""
    found = re.findall(r"^\| .* \| ([\d,]+) of ([\d,]+) \| – \|$", output, re.MULTILINE)
    return [(int(passed.replace(",", "")), int(total.replace(",", ""))) for passed, total in found]


def test_a_run_survives_a_few_points_of_every_torture() -> None:
    done = torture(*FEW)
    assert done.returncode == 0, done.stderr + done.stdout
    wanted = [int(part.partition("=")[2]) for part in FEW]
    passed = figures(done.stdout)
    assert [row for row in passed if row[1] not in (*wanted, 1)] == []  # 1: of the flips that the command is asked for
    assert len(passed) == len(FEW) + 2
    assert all(number == total for number, total in passed)


@pytest.mark.slow
def test_a_run_survives_every_torture() -> None:
    done = torture(*MANY)
    assert done.returncode == 0, done.stderr + done.stdout
    kills, *_ = figures(done.stdout)
    assert kills[1] >= 200
