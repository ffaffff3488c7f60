"""Killed at any file operation of a save, the run finds a good checkpoint, and never an older one than it must."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.train import checkpoint
from lowrank.train.checkpoint import Checkpoints, Saved, newest, read

OPERATIONS: list[tuple[Any, str]] = [
    (checkpoint, "save_file"),
    (io, "open"),
    (os, "mkdir"),
    (os, "open"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "unlink"),
    (os, "rmdir"),
]


class Killed(BaseException):
    """Ends the process where it stands: nothing of ours may catch it."""


class Killer:
    """Counts file operations and kills at the n-th: before it happens, or half-way through what it writes."""

    def __init__(self, at: int, torn: bool) -> None:
        self.at, self.torn, self.count = at, torn, 0

    def watch(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count < self.at:
                return call(*args, **kwargs)
            if self.torn:
                self.tear(name, call, args, kwargs)
            raise Killed

        return watched

    def tear(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What a power cut leaves: a file half written, or the operation done and nothing after it."""
        result = call(*args, **kwargs)
        if name == "save_file":
            path = Path(args[1])
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif hasattr(result, "close"):
            result.close()


@contextlib.contextmanager
def killed_at(number: int, torn: bool) -> Iterator[Killer]:
    killer = Killer(number, torn)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, killer.watch(name, getattr(owner, name)))
        yield killer


def saved(step: int) -> Saved:
    tensors = {"q.adapter.A": torch.full((4, 4), float(step))}
    return Saved({"adapter": tensors, "optimizer": {"q.adapter.A|step": torch.tensor(step)}}, {"step": step})


def commit(folder: Path, step: int) -> None:
    """What the loop's hook does: save, and prune to the newest two."""
    Checkpoints(folder, lambda: saved(step), every=1, keep=2, last=9).save(step)


def folder_with(steps: range, folder: Path) -> None:
    for step in steps:
        commit(folder, step)


def attempt(folder: Path, number: int, torn: bool) -> bool:
    """Whether a save of step 4 over steps 2 and 3 ended before it could be killed."""
    with killed_at(number, torn), contextlib.suppress(Killed):
        commit(folder, 4)
        return True
    return False


@pytest.mark.parametrize("torn", [False, True], ids=["before", "half-way"])
def test_a_kill_at_any_file_operation_leaves_the_newest_good_checkpoint_usable(torn: bool, tmp_path: Path) -> None:
    folder_with(range(1, 4), tmp_path / "start")
    reached = []
    for number in range(1, 200):
        folder = tmp_path / f"kill-{number}"
        shutil.copytree(tmp_path / "start", folder)
        finished = attempt(folder, number, torn)
        found, wrong = newest(folder)
        assert found is not None, number
        step = int(found.name[5:])
        assert step in (3, 4)
        assert not wrong
        assert read(found).state == {"step": step}
        reached.append(step)
        if not finished:  # the next process goes on: it saves the same step, and the one after it
            for following in (4, 5):
                commit(folder, following)
            assert newest(folder) == (folder / "step-00000005", [])
            assert read(folder / "step-00000004").state == {"step": 4}
        shutil.rmtree(folder)
        if finished:
            break
    assert finished
    assert len(reached) > 20  # the kills were real
    assert reached == sorted(reached)  # once committed, it stays


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_full_disk_is_an_error_and_the_older_checkpoint_stays(number: int, tmp_path: Path) -> None:
    folder_with(range(1, 3), tmp_path)

    class Full:
        count = 0

        def write(self, tensors: Any, path: Any, **kwargs: Any) -> None:
            self.count += 1
            if self.count == number or number == 3:
                Path(path).write_bytes(b"\0" * 10)
                raise OSError(28, "No space left on device")
            original(tensors, path, **kwargs)

    original, full = checkpoint.save_file, Full()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full.write)
        with pytest.raises(OSError, match="No space left"):
            commit(tmp_path, 3)
    assert newest(tmp_path) == (tmp_path / "step-00000002", [])
