"""`lowrank compare` as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli import ROOT, environment, lowrank
from sweeping import change, copied

from lowrank import cli


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli.main(["compare", *arguments])
    return capsys.readouterr().out


def test_a_pipe_gets_whole_lines_without_colours(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, str(sweep)).splitlines()
    rows = [line for line in lines if line.split()[:2] in (["8", "0.001"], ["4", "0.01"])]
    assert len(rows) == 2
    assert "2.590" in rows[0]
    assert "\x1b" not in "".join(lines)


def test_files_are_written_where_asked_and_named(sweep: Path, tmp_path: Path) -> None:
    done = lowrank("compare", str(sweep), "--csv", str(tmp_path / "a.csv"), "--html", str(tmp_path / "a.html"))
    assert done.returncode == 0
    assert (tmp_path / "a.csv").read_text().startswith("adapter.r,optim.lr,runs,eval.after.loss.mean")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert done.stdout.splitlines()[-2:] == [str(tmp_path / "a.csv"), str(tmp_path / "a.html")]


def test_broken_runs_are_named_below_the_table(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied(original, tmp_path / "fine", 3.0)
    copied(original, tmp_path / "broken", 3.0)
    change(tmp_path / "broken", status="failed", error="loss is \x1b[31mnan")
    out = told(capsys, str(tmp_path))
    assert "1 of 2 runs are not in it" in out
    assert "broken  failed  loss is \ufffd[31mnan" in out


def test_a_wrong_name_is_one_block_with_exit_code_2(sweep: Path) -> None:
    done = lowrank("compare", str(sweep), "--metric", "eval.after.los")
    assert done.returncode == 2
    assert "Did you mean 'eval.after.loss'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_groups_are_over_the_keys_that_are_named(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, str(sweep), "--group-over", "loop.seed,data.seed,optim.lr", "--keys", "adapter.r")
    assert [line.split()[:2] for line in out.splitlines() if line.split()[1:2] == ["6"]] == [["8", "6"], ["4", "6"]]


def test_nothing_of_it_loads_torch(sweep: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lowrank import cli, compare;"
        f"cli.main(['compare', {str(sweep)!r}, '--html', {str(tmp_path / 'a.html')!r}]);"
        "print('torch' in sys.modules, 'pandas' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        check=True,
        timeout=100,
    )
    assert done.stdout.splitlines()[-1] == "False False"
