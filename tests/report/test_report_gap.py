"""The overfit gap and the warm-up: what the losses and the schedule were, in words and places."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lowrank.report import run
from lowrank.report.charts import warm_up
from lowrank.report.gap import Gap, gap_of
from lowrank.report.recorded import read
from lowrank.train.schedule import warmup_steps


def written(folder: Path, held_out: dict[int, float], steps: int = 40, **files: Any) -> Path:
    """A run whose training loss falls from 3 in a straight line, a hundredth a step."""
    rows: list[dict[str, Any]] = [
        {"event": "step", "step": n, "loss": 3 - n / 100, "lr": 1} for n in range(1, steps + 1)
    ]
    rows += [{"event": "eval", "step": step, "loss": loss} for step, loss in held_out.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def gap(folder: Path, held_out: dict[int, float], **more: Any) -> Gap:
    found = gap_of(read(written(folder, held_out, **more)))
    assert found is not None
    return found


def test_the_gap_is_the_held_out_loss_less_the_smoothed_training_loss_at_that_step(tmp_path: Path) -> None:
    found = gap(tmp_path, {0: 9.0, 10: 3.0, 20: 2.9, 40: 2.8})
    assert found.steps == [10, 20, 40]
    assert found.values == pytest.approx([3.0 - 2.9, 2.9 - 2.8, 2.8 - 2.6])


def test_a_held_out_loss_that_has_turned_is_told(tmp_path: Path) -> None:
    said = str(gap(tmp_path, {10: 2.95, 20: 2.5, 40: 2.75}))
    assert "At step 40 the held-out loss lies 0.150 above" in said
    assert "It was lowest, 2.500, at step 20, and has risen by 0.250 since" in said


@pytest.mark.parametrize(
    ("held_out", "falling"), [({10: 2.9, 40: 2.5}, True), ({10: 2.501, 20: 2.5, 40: 2.501}, False)]
)
def test_one_that_fell_or_lies_flat_is_not_called_overfit(
    tmp_path: Path, held_out: dict[int, float], falling: bool
) -> None:
    said = str(gap(tmp_path, held_out))
    assert "overfit" not in said
    assert "below" in said
    assert ("lowest at the end" in said) == falling


def test_the_last_evaluation_may_lie_in_the_summary_alone(tmp_path: Path) -> None:
    summary = {"status": "done", "steps": 40, "eval": {"after": {"loss": 2.7}}}
    assert gap(tmp_path, {10: 3.0}, summary=summary).steps == [10, 40]


def test_a_run_without_an_evaluation_or_without_steps_has_no_gap(tmp_path: Path) -> None:
    assert gap_of(read(written(tmp_path, {0: 3.0}))) is None
    assert gap_of(read(written(tmp_path, {10: 3.0}, steps=0))) is None
    assert "Overfit gap" not in run.write(written(tmp_path, {10: 3.0, 20: 3.0})).read_text()
    assert "Overfit gap" in run.write(written(tmp_path, {10: 3.0, 20: 3.0, 30: 3.0})).read_text()


@pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 0.999, 1, 7, 12.0])
@pytest.mark.parametrize("total", [1, 20, 333])
def test_the_warm_up_that_is_marked_is_the_one_that_was_trained_with(warmup: float, total: int) -> None:
    assert warm_up(warmup, total) == warmup_steps(warmup, total)


@pytest.mark.parametrize(("warmup", "said"), [(8, "warm-up (8 steps)"), (0.1, "warm-up (4 steps)"), (0, None)])
def test_warm_up_is_marked_over_its_steps(tmp_path: Path, warmup: float, said: str | None) -> None:
    (tmp_path / "config.yaml").write_text(f"schedule:\n  warmup: {warmup}\n")
    text = run.write(written(tmp_path, {}, identity={"identity": {"steps": 40}})).read_text()
    assert ("warm-up" in text) == (said is not None)
    assert said is None or text.count(f">{said}<") == 3  # the loss for a wide and a narrow screen, and the rate


def test_where_a_run_was_resumed_is_marked(tmp_path: Path) -> None:
    identity = {"earlier": [{"time": "then"}], "provenance": {"after_step": 12}}
    assert ">resumed<" in run.write(written(tmp_path, {}, identity=identity)).read_text()
    assert ">resumed<" not in run.write(written(tmp_path, {}, identity={"provenance": {}})).read_text()


def test_a_hundred_thousand_steps_make_a_small_page_soon(tmp_path: Path) -> None:
    loss = 'loss": 2.%d, "grad_norm": 0.%d, "tokens_per_s": 50%d, "lr": 1e-4}\n'
    lines = (
        f'{{"event": "step", "step": {n}, "' + loss % (n * 7919 % 97, n % 9 + 1, n % 10) for n in range(1, 100_001)
    )
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    begun = time.process_time()
    path = run.write(tmp_path)
    assert time.process_time() - begun < 15  # 2 on a machine that does nothing else
    assert path.stat().st_size < 400_000
