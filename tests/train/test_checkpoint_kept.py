"""Which checkpoints stay: the newest that are good, and the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.train.checkpoint import Checkpoints, Saved, committed, newest, read, save, verify
from lowrank.train.hooks import StepRecord


def saved(step: int, **state: Any) -> Saved:
    return Saved({"adapter": {"A": torch.full((2, 2), float(step))}}, {"step": step, **state})


def names(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in committed(folder)]


def index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "index.json").read_text())


class Course:
    """Steps with held-out losses (None: not evaluated), saved one by one."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.step, self.loss = 0, None
        self.hook = Checkpoints(folder, self.snapshot, every=1, keep=keep, last=1000)

    def snapshot(self) -> Saved:
        return saved(self.step, held_out_loss=self.loss)

    def go(self, losses: dict[int, float | None]) -> Course:
        for self.step, self.loss in losses.items():
            self.hook.after_step(StepRecord(self.step, 1.0, 1e-4, 0.1, 5, 9, 1.0, 1.0, 1.0))
        return self


LOSSES = {1: 3.0, 2: 2.0, 3: None, 4: 2.5, 5: 2.0, 6: 2.7}


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_stay_and_beside_them_the_best(keep: int, tmp_path: Path) -> None:
    Course(tmp_path, keep).go(LOSSES)
    assert names(tmp_path) == sorted({2, *list(LOSSES)[-keep:]})
    assert index(tmp_path) == {"newest": "step-00000006", "best": "step-00000002"}
    assert read(newest(tmp_path)[0]).state["best"] == {"step": 2, "loss": 2.0}


def test_without_an_evaluation_the_newest_stay(tmp_path: Path) -> None:
    Course(tmp_path, 2).go({1: None, 2: None, 3: None})
    assert names(tmp_path) == [2, 3]
    assert index(tmp_path)["best"] is None


def test_a_loss_that_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    Course(tmp_path, 1).go({1: float("nan"), 2: 2.0, 3: float("inf"), 4: 3.0})
    assert index(tmp_path)["best"] == "step-00000002"


def test_the_best_is_known_after_a_resume(tmp_path: Path) -> None:
    Course(tmp_path, 1).go({1: 2.0, 2: 3.0})
    later = Course(tmp_path, 1)
    later.hook.restore(read(newest(tmp_path)[0]).state)
    later.go({3: 2.5, 4: 2.6})
    assert names(tmp_path) == [1, 4]
    later.go({5: 1.5, 6: None})
    assert names(tmp_path) == [5, 6]
    assert index(tmp_path) == {"newest": "step-00000006", "best": "step-00000005"}


def test_a_damaged_checkpoint_counts_for_none_of_those_that_stay(tmp_path: Path) -> None:
    """With two to keep, the one before the damaged one is the second."""
    for step in (1, 2, 3):
        save(tmp_path, step, saved(step))
    (tmp_path / "step-00000003" / "state.json").unlink()
    Course(tmp_path, 2).go({4: None})
    assert names(tmp_path) == [2, 3, 4]
    assert verify(tmp_path / "step-00000002") is None
    assert index(tmp_path)["newest"] == "step-00000004"


def test_a_damaged_newer_one_does_not_stand_for_a_good_one(tmp_path: Path) -> None:
    """A run that went back to step 2, since 9 is damaged, may not delete 2 on the strength of 9."""
    for step in (1, 2, 9):
        save(tmp_path, step, saved(step))
    (tmp_path / "step-00000009" / "adapter.safetensors").write_bytes(b"")
    course = Course(tmp_path, 1)
    course.hook.restore({})
    assert names(tmp_path) == [2, 9]
    course.go({3: None})
    assert names(tmp_path) == [3, 9]
    assert newest(tmp_path)[0] == tmp_path / "step-00000003"
    course.go({9: None})
    assert (names(tmp_path), newest(tmp_path)) == ([9], (tmp_path / "step-00000009", []))


def test_what_was_written_wrong_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses bytes: what comes back is not what was written, and the older ones are all there is."""
    course = Course(tmp_path, 1).go({1: None})
    rename = Path.rename

    def losing(path: Path, target: Path) -> Path:
        if target.name == "step-00000002":
            (path / "adapter.safetensors").write_bytes(b"\0" * (path / "adapter.safetensors").stat().st_size)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", losing)
    course.go({2: None})
    assert names(tmp_path) == [1, 2]
    assert newest(tmp_path)[0] == tmp_path / "step-00000001"


@pytest.mark.parametrize("best", [3, [], {"step": "../../x", "loss": 1.0}, {"step": 1}, {"step": 1, "loss": None}])
def test_a_best_that_is_none_is_taken_for_none(best: Any, tmp_path: Path) -> None:
    save(tmp_path, 1, saved(1, best=best))
    course = Course(tmp_path, 1)
    course.hook.restore({"best": best})
    assert index(tmp_path)["best"] is None
    course.go({2: 5.0})
    assert index(tmp_path)["best"] == "step-00000002"
