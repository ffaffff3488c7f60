from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.models.cache import cache, prepared

WRITE = """
import os, sys, time
from lowrank.models.cache import prepared

def make(folder):
    time.sleep(0.5)
    (folder / "made").write_text("x")
    print("made")

prepared("thing", make)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    return tmp_path


def test_the_cache_is_the_variables_folder_else_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache() == tmp_path
    monkeypatch.delenv("LOWRANK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache() == Path("/x/lowrank")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache() == Path.home() / ".cache" / "lowrank"


def test_processes_that_ask_at_once_make_it_once() -> None:
    command = [sys.executable, "-c", WRITE]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    assert "".join(printed) == "made\n"


def test_what_fails_half_way_leaves_nothing_and_can_be_tried_again(own: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepared("thing", fail)
    assert [path.name for path in own.iterdir() if path.is_dir()] == []
    assert prepared("thing", lambda folder: None) == own / "thing"


def test_what_a_killed_process_left_is_not_part_of_the_result(own: Path) -> None:
    (own / ".staging-thing").mkdir()
    (own / ".staging-thing" / "torn").write_text("x")
    made = prepared("thing", lambda folder: (folder / "whole").touch())
    assert [path.name for path in made.iterdir()] == ["whole"]
    assert prepared("thing", lambda folder: pytest.fail("made twice")) == made
