"""Processes that are killed or asked to leave, from outside and for good; what they leave goes on."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli import lowrank as lowrank_command
from cli import write_rows
from resuming import ROWS, SHORT, at_call, differing, ended, process, resumed, terminate

import lowrank
from lowrank import cli
from lowrank.errors import Interrupted

LONG = (*SHORT, "loop.steps=40", "checkpoint.every=4", "eval.every=8", "adapter.dropout=0.1", "eval.before=true")
WAYS = [(), ("checkpoint.background=true",)]


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (*LONG, f"data.path={write_rows(tmp_path_factory.mktemp('data') / 'rows.jsonl', ROWS)}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, overrides: tuple[str, ...]) -> Path:
    return lowrank.train([*overrides], tmp_path_factory.mktemp("whole") / "run").folder


def steps_told(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'"event": "step"') if path.exists() else 0


def reaches(child: subprocess.Popen[str], folder: Path, steps: int) -> None:
    """Returns when that many steps are in its metrics; fails where the process ends before."""
    while steps_told(folder) < steps:
        assert child.poll() is None, child.communicate()
        time.sleep(0.002)


def status(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["status"])


def test_a_killed_process_s_run_goes_on(whole: Path, overrides: tuple[str, ...], tmp_path: Path) -> None:
    child = process(tmp_path, *overrides)
    reaches(child, tmp_path, 10)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    cli.main(["resume", str(tmp_path)])
    assert differing(ended(whole), ended(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_process_that_is_asked_to_leave_saves_and_lowrank_resume_goes_on(
    number: int, whole: Path, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    child = process(tmp_path, *overrides)
    reaches(child, tmp_path, 10)
    child.send_signal(number)
    _, said = child.communicate()
    assert (child.returncode, status(tmp_path)) == (130, "interrupted"), said
    assert 'File "' not in said
    went_on = lowrank_command("resume", str(tmp_path))
    assert went_on.returncode == 0, went_on.stderr
    assert status(tmp_path) == "done"
    assert differing(ended(whole), ended(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=["foreground", "background"])
@pytest.mark.parametrize("update", [1, 4, 5, 39, 40])
def test_a_process_killed_within_a_step(
    update: int, way: tuple[str, ...], whole: Path, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    child = process(tmp_path, *overrides, *way, before=f"on = at_update({update}, kill); on.__enter__()")
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    resumed(tmp_path, *overrides)
    assert differing(ended(whole), ended(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=["foreground", "background"])
def test_a_process_killed_at_any_moment_again_and_again(
    way: tuple[str, ...], whole: Path, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """Not at chosen steps: after so many milliseconds, wherever it then is, until one comes to the end."""
    moments = random.Random(0)
    for _ in range(12):
        child = process(tmp_path, *overrides, *way, "checkpoint.resume=true")
        reaches(child, tmp_path, min(steps_told(tmp_path) + 1, 36))
        time.sleep(moments.uniform(0, 0.15))
        child.send_signal(moments.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        child.communicate()
    resumed(tmp_path, *overrides)
    assert differing(ended(whole), ended(tmp_path)) == []


@pytest.mark.slow
def test_a_process_killed_while_it_replaces_its_only_checkpoint(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """The last step's, saved when a signal broke its evaluation off, which the resume completes."""
    alone = (*overrides, "checkpoint.every=100", "loop.steps=8")
    whole = lowrank.train([*alone], tmp_path / "whole").folder
    folder = tmp_path / "run"
    with pytest.raises(Interrupted), at_call(1, terminate, training=False):
        lowrank.train([*alone], folder)
    child = process(folder, *alone, "checkpoint.resume=true", before="kill_while_replacing()")
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not [*(folder / "checkpoints").glob("step-*")]
    resumed(folder, *alone)
    assert "nothing to resume from" not in (folder / "events.log").read_text()
    assert differing(ended(whole), ended(folder)) == []
