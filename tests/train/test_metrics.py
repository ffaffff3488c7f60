"""metrics.jsonl: a JSON object a line, whole or not there, cut back on resume."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lowrank.errors import RefusedError
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.metrics import MethodEvents, Metrics, read, refuse_changed


def record(step: int, loss: float = 1.5) -> StepRecord:
    return StepRecord(step, loss, 1e-4, 0.25, 12, 100, 50.0, 300.0, 2.0)


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        metrics.after_step(record(step))
        rows = read(tmp_path / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, step + 1))
    metrics.close()
    assert rows[0] == record(1).to_dict()


def test_every_line_is_json_that_other_programs_read(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.after_step(record(1, loss=math.nan))
    metrics.write({"event": "eval", "step": 1, "loss": math.inf, "note": "–"})
    metrics.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["loss"] for row in rows] == [None, None]
    assert rows[1]["note"] == "–"


def test_rows_are_appended_to_what_an_earlier_process_wrote(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        metrics = Metrics(path)
        metrics.after_step(record(step))
        metrics.close()
        assert metrics.place() == {
            "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
        }  # fmt: skip
    assert [row["step"] for row in read(path)] == [1, 2, 3]


def left_by_a_crash(path: Path) -> dict[str, Any]:
    """A row, the place of a checkpoint, a second row, and the beginning of a third."""
    metrics = Metrics(path)
    metrics.after_step(record(1))
    place = metrics.place()
    metrics.after_step(record(2, loss=9.0))
    metrics.close()
    with path.open("ab") as file:
        file.write(b'{"event": "st')
    return place


def test_cutting_back_to_a_checkpoints_place_neither_repeats_nor_drops_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    place = left_by_a_crash(path)
    again = Metrics(path)
    again.cut(place)
    assert again.place() == place
    again.after_step(record(2))
    again.close()
    assert [(row["step"], row["loss"]) for row in read(path)] == [(1, 1.5), (2, 1.5)]
    assert again.place()["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_that_starts_at_step_1_keeps_no_row_of_one_that_never_came_to_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    left_by_a_crash(path)
    again = Metrics(path)
    again.cut(None)
    again.after_step(record(1, loss=7.0))
    again.close()
    assert [(row["step"], row["loss"]) for row in read(path)] == [(1, 7.0)]


@pytest.mark.parametrize("harm", ["shorter", "one bit", "gone"])
def test_a_file_that_is_not_what_a_checkpoint_was_made_after_is_refused_and_left_alone(
    tmp_path: Path, harm: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    place = left_by_a_crash(path)
    raw = path.read_bytes()
    harmed = {
        "shorter": raw[: place["bytes"] - 1],
        "one bit": bytes([raw[0] ^ 1]) + raw[1:],
        "gone": b"",
    }[harm]
    path.write_bytes(harmed)
    metrics = Metrics(path)
    with pytest.raises(RefusedError, match=r"metrics\.jsonl: its first .* bytes are not those"):
        metrics.cut(place)
    metrics.close()
    assert path.read_bytes() == harmed
    path.unlink()
    with pytest.raises(RefusedError, match="Put the file back"):
        refuse_changed(path, place)


class TellsEverySecondStep(Hook):
    def event(self, step: int) -> dict[str, Any] | None:
        return {"event": "half", "of": step // 2} if step % 2 == 0 else None


def test_what_a_methods_hook_tells_of_a_step_is_a_row_of_that_step(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    hooks = [metrics, MethodEvents([Hook(), TellsEverySecondStep()], metrics)]
    for step in (1, 2, 3, 4):
        for hook in hooks:
            hook.after_step(record(step))
    metrics.close()
    rows = read(tmp_path / "metrics.jsonl")
    assert [(row["event"], row["step"]) for row in rows] == [
        ("step", 1), ("step", 2), ("half", 2), ("step", 3), ("step", 4), ("half", 4),
    ]  # fmt: skip
    assert rows[2] == {"event": "half", "step": 2, "of": 1}


def test_a_line_that_a_crash_tore_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps({"event": "step", "step": 1}) + "\n"
    for cut in range(1, len(whole)):
        path.write_bytes(whole.encode() + whole.encode()[:cut])
        assert [row["step"] for row in read(path)] == [1] * (2 if cut == len(whole) else 1)
    assert read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("damage", [b"{\xff}", b'{"step": 1', b"[1]", b"[" * 100_000])
def test_a_line_in_the_middle_that_is_no_row_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n')
    with pytest.raises(RefusedError, match=r"metrics\.jsonl:2: cannot be read"):
        read(path)
