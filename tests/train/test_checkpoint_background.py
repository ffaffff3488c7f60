"""Written beside the steps, a checkpoint is the same as one written between them, and what goes wrong is not lost."""

from __future__ import annotations

import errno
import os
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.train.background import Background, Foreground
from lowrank.train.checkpoint import Checkpoints, Saved, committed, newest
from lowrank.train.hooks import StepRecord


class Run:
    """A tensor and a list that every step changes in place."""

    def __init__(self, folder: Path, writer: Any, **options: Any) -> None:
        self.weight, self.list = torch.zeros(64, 32), [0.0]
        self.moments = {"step": torch.tensor(0.0), "table": torch.zeros(8, dtype=torch.uint8)}
        self.hook = Checkpoints(
            folder, self.snapshot, **{"every": 1, "keep": 9, "last": 9, "writer": writer, **options}
        )

    def snapshot(self) -> Saved:
        files = {"adapter": {"A": self.weight, "A.T": self.weight.T}, "optimizer": self.moments}
        return Saved(files, {"list": self.list, "held_out_loss": self.list[-1]})

    def step(self, number: int) -> None:
        self.weight += number
        self.moments["step"] += 1
        self.moments["table"] += 3
        self.list.append(1 / number)
        self.hook.after_step(StepRecord(number, 1.0, 1e-4, 0.1, 5, 9, 1.0, 1.0, 1.0))


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def writer() -> Iterator[Background]:
    made = Background()
    yield made
    made.close()


class Gate:
    """Holds up every write of one thread until it is opened, and counts those that wait."""

    def __init__(self, patch: pytest.MonkeyPatch, fail: bool = False) -> None:
        self.open, self.reached, self.fail = threading.Event(), threading.Event(), fail
        self.write = os.write
        patch.setattr(os, "write", self)

    def __call__(self, descriptor: int, data: Any) -> int:
        if threading.current_thread() is not threading.main_thread():
            self.reached.set()
            assert self.open.wait(30)
            if self.fail:
                raise OSError(errno.ENOSPC, "No space left on device")
        return self.write(descriptor, data)


def test_foreground_and_background_give_the_same_bytes_in_every_file(writer: Background, tmp_path: Path) -> None:
    for name, chosen in (("fore", Foreground()), ("back", writer)):
        run = Run(tmp_path / name, chosen)
        for number in range(1, 5):
            run.step(number)
        run.hook.wait()
    fore, back = content(tmp_path / "fore"), content(tmp_path / "back")
    assert len(fore) == 4 * 4 + 1  # adapter, optimizer, state, manifest; index.json
    assert fore == back


def test_what_changes_while_it_is_written_is_saved_as_it_was(
    writer: Background, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, run = Run(tmp_path / "fore", Foreground()), Run(tmp_path / "back", writer)
    plain.step(1)
    gate = Gate(monkeypatch)
    run.step(1)  # comes back although nothing can be written
    assert gate.reached.wait(30)
    assert committed(tmp_path / "back") == []
    run.weight.fill_(7)
    run.moments["table"].fill_(7)
    run.list.append(7.0)
    gate.open.set()
    run.hook.wait()
    assert content(tmp_path / "back") == content(tmp_path / "fore")


def test_a_second_save_waits_for_the_first(writer: Background, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, gate = Run(tmp_path, writer), Gate(monkeypatch)
    run.step(1)
    assert gate.reached.wait(30)
    second = threading.Timer(0.2, gate.open.set)
    second.start()
    run.step(2)  # would overwrite the copy that is being written
    assert newest(tmp_path)[0] == tmp_path / "step-00000001"
    second.join()
    assert run.hook.save(3) == tmp_path / "step-00000003"  # an ending: committed when it returns
    assert [path.name[-1] for path in committed(tmp_path)] == ["1", "2", "3"]


@pytest.mark.parametrize("when", ["at the next step", "at an ending", "when waited for"])
def test_an_error_is_raised_where_the_run_is_with_its_own_traceback(
    when: str, writer: Background, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, writer, every=2)
    with monkeypatch.context() as patch:
        gate = Gate(patch, fail=True)
        run.step(2)
        gate.open.set()
        wait([run.hook.writer.pending])
    with pytest.raises(OSError, match="No space left") as raised:
        {"at the next step": lambda: run.step(3), "at an ending": lambda: run.hook.save(3)}.get(when, run.hook.wait)()
    assert "disk.py" in "".join(traceback.format_exception(raised.value))  # where it happened, in the thread
    assert [path.name for path in tmp_path.iterdir()] == []  # no staging folder either
    assert run.hook.save(3).is_dir()  # the disk has room again: nothing stands in the way


def test_an_error_that_an_ending_has_no_time_for_is_returned_not_raised(
    writer: Background, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, gate = Run(tmp_path, writer), Gate(monkeypatch, fail=True)
    gate.open.set()
    run.step(1)
    assert isinstance(run.hook.close(), OSError)


def test_closing_finishes_what_was_begun(writer: Background, tmp_path: Path) -> None:
    run = Run(tmp_path, writer)
    run.step(1)
    assert run.hook.close() is None
    assert newest(tmp_path) == (tmp_path / "step-00000001", [])


def test_the_copy_takes_no_new_memory_at_the_next_save(writer: Background) -> None:
    tensor = {"adapter": {"A": torch.zeros(4, 4)}}
    first = writer.held(tensor)["adapter"]["A"]
    assert first.data_ptr() != tensor["adapter"]["A"].data_ptr()
    assert writer.held(tensor)["adapter"]["A"].data_ptr() == first.data_ptr()
    grown = writer.held({"adapter": {"A": torch.ones(5, 4)}})["adapter"]["A"]
    assert torch.equal(grown, torch.ones(5, 4))
