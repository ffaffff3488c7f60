"""A run that saves in the background is the run that saves between steps, and loses nothing when a save fails."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import SMALL, write_rows

import lowrank
from lowrank import manifest

RUN = ("model=tiny_llama", "adapter.dropout=0.1", "loop.steps=8", "checkpoint.every=2", "checkpoint.keep=9")
CLOCKED = ("seconds", "metrics")  # of a state: what tells of time, and the hash of rows that do


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        rows = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")
        yield [*SMALL, *RUN, f"data.path={rows}", "eval.before=false", "eval.every=4"]


@pytest.fixture(scope="module")
def foreground(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowrank.train(overrides, tmp_path_factory.mktemp("run") / "fore").folder


def saved(folder: Path) -> dict[str, Any]:
    """Every file of the checkpoints and of the final adapter; of states what does not tell of time."""
    found: dict[str, Any] = {}
    for path in sorted([*folder.glob("checkpoints/**/*"), *folder.glob("adapter/*")]):
        name = path.relative_to(folder).as_posix()
        if path.name == "state.json":
            state = json.loads(path.read_bytes())
            state["loop"].pop("seconds")
            found[name] = {key: value for key, value in state.items() if key not in CLOCKED}
        elif path.is_file() and not (path.name == "MANIFEST.json" and "step-" in name):
            found[name] = path.read_bytes()
    return found


def whole(folder: Path) -> bool:
    return all(manifest.verify(path) is None for path in [*manifest.committed(folder / "checkpoints")])


def test_every_file_is_the_same(overrides: list[str], foreground: Path, tmp_path: Path) -> None:
    run = lowrank.train([*overrides, "checkpoint.background=true"], tmp_path / "back")
    assert len(saved(foreground)) == 4 * 3 + 1 + 5
    assert saved(run.folder) == saved(foreground)
    assert whole(run.folder)


def test_a_save_that_fails_ends_the_run_and_a_resume_makes_it_whole(
    overrides: list[str], foreground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write, background = tmp_path / "back", os.write, [*overrides, "checkpoint.background=true"]

    def full(descriptor: int, data: Any) -> int:
        if (
            threading.current_thread() is not threading.main_thread()
            and (folder / "checkpoints/step-00000004").exists()
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            lowrank.train(background, folder)
    assert lowrank.open(folder).summary["status"] == "failed"
    assert "disk.py" in (folder / "events.log").read_text()  # the thread's own traceback
    assert manifest.newest(folder / "checkpoints") == (folder / "checkpoints/step-00000004", [])
    assert not list(folder.glob("checkpoints/.staging*"))
    lowrank.train([*background, "checkpoint.resume=true"], folder)
    assert saved(folder) == saved(foreground)
