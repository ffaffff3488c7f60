"""Killed at any file operation of a save, the run finds a good checkpoint, and never an older one than it must."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.train.checkpoint import Checkpoints, Saved, committed, newest, read

OPERATIONS: list[tuple[Any, str]] = [
    *((os, name) for name in ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "ftruncate")),
    (io, "open"),
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
            if self.count == self.at and self.torn:
                if name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                elif name not in ("open",):
                    call(*args, **kwargs)
            raise Killed  # from then on the process does nothing any more

        return watched


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


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("damaged", [False, True], ids=["new", "over-a-damaged-one"])
@pytest.mark.parametrize("torn", [False, True], ids=["before", "half-way"])
def test_a_kill_at_any_file_operation_leaves_the_newest_good_checkpoint_usable(
    torn: bool, damaged: bool, tmp_path: Path
) -> None:
    folder_with(range(1, 4), tmp_path / "start")
    if damaged:
        shutil.copytree(tmp_path / "start/step-00000003", tmp_path / "start/step-00000004")
        (tmp_path / "start/step-00000004/optimizer.safetensors").write_bytes(b"")
    reached = []
    for number in range(1, 300):
        folder = tmp_path / f"kill-{number}"
        shutil.copytree(tmp_path / "start", folder)
        finished = attempt(folder, number, torn)
        found, wrong = newest(folder)
        assert found is not None, number
        step = int(found.name[5:])
        assert step in (3, 4)
        assert wrong == [] or (damaged and wrong[0].startswith(f"{folder.name}/step-00000004/optimizer"))
        assert read(found).state["step"] == step
        reached.append(step)
        if not finished:  # the next process goes on: it saves the same step, and the one after it
            for following in (4, 5):
                commit(folder, following)
        assert left(folder) == {"index.json", *(path.name for path in committed(folder))}
        assert newest(folder) == (folder / f"step-{4 if finished else 5:08d}", [])
        assert read(folder / "step-00000004").state["step"] == 4
        shutil.rmtree(folder)
        if finished:
            break
    assert finished
    assert len(reached) > 30  # the kills were real
    assert reached == sorted(reached)  # once committed, it stays


def test_no_folder_called_step_is_ever_seen_in_part(tmp_path: Path) -> None:
    """Not even the one that is being deleted: all that are there after a kill verify."""
    folder_with(range(1, 4), tmp_path / "start")
    for number in range(1, 300):
        folder = tmp_path / f"kill-{number}"
        shutil.copytree(tmp_path / "start", folder)
        finished = attempt(folder, number, torn=True)
        for path in committed(folder):
            assert read(path).state["step"] == int(path.name[5:]), number
        if finished:
            break
    assert finished


def test_a_disk_that_is_full_at_any_write_is_an_error_and_nothing_is_left_or_lost(tmp_path: Path) -> None:
    folder_with(range(1, 3), tmp_path)
    before, room = left(tmp_path), 0
    while not (tmp_path / "step-00000003").exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", Full(os.write, room))
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):  # the last time of all, for the index
                commit(tmp_path, 3)
        if not (tmp_path / "step-00000003").exists():
            assert left(tmp_path) == before
            assert newest(tmp_path) == (tmp_path / "step-00000002", [])
        room += 1
    assert room > 5
    commit(tmp_path, 3)
    assert newest(tmp_path) == (tmp_path / "step-00000003", [])


class Full:
    """A disk with room for so many writes; the next one is cut short, and then nothing goes any more."""

    def __init__(self, write: Callable[..., int], room: int) -> None:
        self.write, self.room = write, room

    def __call__(self, descriptor: int, data: Any) -> int:
        self.room -= 1
        if self.room == -1 and len(data) > 1:
            return self.write(descriptor, data[: len(data) // 2])
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(descriptor, data)
