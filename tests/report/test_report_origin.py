"""How a run was made, on its page: the command from nothing, every process, the code, the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowrank.report import dataset, run
from lowrank.report.origin import Origin, origin
from lowrank.report.recorded import read

TRAIN = "python train.py 'data.path=my file.jsonl' loop.steps=6"
FIRST = {"command": TRAIN, "time": "2026-01-02T03:04:05+0000", "directory": "/home/me", "host": "box"}
COUNTS = {"rows": 3, "tokens": 40, "target_tokens": 10, "longest": 20, "truncated": 1, "lengths": [0, 2, 1]}
DATA: dict[str, Any] = {
    "name": "mine.jsonl",
    "sha256": "ab" * 32,
    "notes": ["data: 4 train examples without a target token dropped"],
    "width": 8,
    "train": COUNTS,
    "eval": {**COUNTS, "rows": 1, "truncated": 0},
    "shown": [
        {"row": 2, "tokens": 9, "target_tokens": 2, "cut": 5, "runs": [{"target": True, "pieces": ["a\n", "<b>"]}]}
    ],
}


def made(folder: Path, summary: dict[str, Any] | None = None, **identity: Any) -> Origin:
    (folder / "identity.json").write_text(json.dumps(identity))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return origin(read(folder))


def test_a_run_in_one_piece_is_told_by_its_command_and_where_it_was_given(tmp_path: Path) -> None:
    found = made(tmp_path, {"command": TRAIN, "git": {"commit": "abc", "dirty": False}}, provenance=FIRST)
    assert found.command == TRAIN
    assert found.where == [("in", "/home/me"), ("code", "abc")]
    assert found.processes == []


@pytest.mark.parametrize(
    "resumed",
    [
        f"{TRAIN} checkpoint.resume=true 'checkpoint.allow=[optim.lr]'",
        f"{TRAIN} 'checkpoint.resume=true'",
        "lowrank resume x",
    ],
)
def test_of_a_resumed_run_the_command_is_the_one_from_nothing_and_every_process_is_told(
    tmp_path: Path, resumed: str
) -> None:
    last = {"command": resumed, "time": "later", "after_step": 4, "changed": {"optim.lr": "1 → 2"}}
    found = made(tmp_path, {"command": resumed}, earlier=[FIRST], provenance=last)
    assert found.command == TRAIN
    assert [(one.steps, one.changed, one.command) for one in found.processes] == [
        ("from the start", [], ""),
        ("after step 4", ["optim.lr: 1 → 2"], resumed),
    ]
    text = run.write(tmp_path).read_text()
    assert "Interrupted and resumed" in text
    assert "optim.lr: 1 → 2" in text


def test_a_run_that_was_cut_off_still_has_its_command_and_versions(tmp_path: Path) -> None:
    found = made(tmp_path, None, provenance=FIRST, identity={"versions.torch": "2.13", "threads": 2, "packed": True})
    assert found.command == TRAIN
    assert found.versions == [("torch", "2.13")]
    assert {("threads", "2"), ("packed", "yes"), ("host", "box")} <= set(found.conditions)


def test_code_that_was_not_committed_is_told(tmp_path: Path) -> None:
    summary = {"git": {"commit": "abc", "dirty": True}}
    assert ("code", "abc and changes that were not kept") not in made(tmp_path, {"git": {"commit": "abc"}}).where
    (tmp_path / "code.patch").write_text("diff")
    assert made(tmp_path, summary).where == [("code", "abc and code.patch in the run directory")]


def test_the_data_card_is_on_the_page_and_its_texts_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    text = run.write(tmp_path).read_text()
    for fact in (
        "mine.jsonl",
        "ab" * 32,
        "4 train examples",
        "25.0 %",
        "13.3",
        "row 2 · 9 tokens · 2 of them learnt · 5 cut off",
    ):
        assert fact in text
    assert "<mark><i>a↵\n</i><i>&lt;b&gt;</i></mark>" in text
    assert "9–16 tokens\n66.7 % of the rows to train on\n66.7 % of the rows held out" in text


def test_of_a_run_that_wrote_no_card_the_summary_s_name_and_hash_are_shown(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"data": {"name": "mine.jsonl", "sha256": "cd" * 32}}))
    text = run.write(tmp_path).read_text()
    assert "cd" * 32 in text
    assert "As the model reads it" not in text


@pytest.mark.parametrize(
    "value",
    [None, True, "text", [], {}, -1, 10**400, float("nan"), ["x", None, -1], [{}], {"lengths": [float("nan"), "x"]}],
    ids=lambda value: repr(value)[:20],
)
@pytest.mark.parametrize("name", [*DATA, "runs", "pieces", "lengths", "rows", "tokens"])
def test_any_field_may_hold_anything(tmp_path: Path, name: str, value: Any) -> None:
    def put(found: Any) -> Any:
        if isinstance(found, dict):
            return {key: value if key == name else put(one) for key, one in found.items()}
        return [put(one) for one in found] if isinstance(found, list) else found

    (tmp_path / "data.json").write_text(json.dumps(put(DATA)))
    run.write(tmp_path)


def test_a_card_of_nothing_is_no_card() -> None:
    assert dataset.card({}, {}) is None
    assert dataset.card({"name": None, "train": 3}, {"data": "x"}) is None
