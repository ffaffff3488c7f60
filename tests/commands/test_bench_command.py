"""``lowrank bench``: a point is the run's own steps in a process of its own, and two points are told apart or not."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from cli import SMALL

from lowrank import cli, compose, run
from lowrank.commands.bench import Bench, beside, compared, point
from lowrank.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("cache")
TINY = ("model=tiny_llama", *SMALL)


def test_a_row_tells_of_the_steps_that_training_takes(rows: Path, tmp_path: Path, capfd: Any) -> None:
    given = [*TINY, f"data.path={rows}"]
    trained = run.train(compose.compose([*given, "loop.steps=4", "eval.before=false"]), tmp_path / "run").metrics
    steps = [row for row in trained if row["event"] == "step"][1:]
    capfd.readouterr()
    cli.main(["bench", *given, "--steps", "3", "--warmup", "1", "--out", str(tmp_path / "bench.jsonl")])
    (row,) = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert row["loss"] == steps[-1]["loss"]
    assert row["tokens_a_step"] * 3 == sum(step["real_tokens"] for step in steps)
    ratio = sum(step["target_tokens"] for step in steps) / sum(step["real_tokens"] for step in steps)
    assert row["target_tokens_per_s"] / row["tokens_per_s"] == pytest.approx(ratio)
    assert row["step_s_quartiles"][0] <= row["step_s"] <= row["step_s_quartiles"][1]
    assert row["start_s"] > row["step_s"] > 0
    assert row["peak_mb"] > 50
    assert compose.config.parse(row["config"]).loop.steps == 4
    for name in ("time", "command", "overrides", "shapes", "cpu", "threads", "versions", "git", "fast"):
        assert row[name], name
    out, _ = capfd.readouterr()
    assert len(out.splitlines()) == 1
    assert f"{row['tokens_per_s']:,.0f} tokens/s" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"overrides": ["optim.lrr=1"]}, "optim.lrr: unknown key"),
        ({"overrides": [], "against": ["loop.stesp=1"]}, "loop.stesp: unknown key"),
        ({"overrides": [], "steps": 0}, "--steps: 0"),
        ({"overrides": [], "warmup": -1}, "--warmup: -1"),
    ],
)
def test_what_is_wrong_is_refused_before_a_process_starts(
    given: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere")  # starting one would be another error
    with pytest.raises(ConfigError, match=said):
        list(Bench(**given, out=tmp_path / "bench.jsonl").run())
    assert not (tmp_path / "bench.jsonl").exists()


def test_a_point_ends_with_the_error_of_its_run(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"bad.jsonl:1: not valid JSON"):
        point([*TINY, f"data.path={tmp_path / 'bad.jsonl'}"], 1, 0)


def test_the_second_point_is_the_first_but_for_what_is_given() -> None:
    first = ["adapter=lora", "adapter.r=4", "+optim.amsgrad=true"]
    assert beside(first, ["adapter.r=8", "loop.fast=false"]) == [
        *("adapter=lora", "+optim.amsgrad=true"),
        *("adapter.r=8", "loop.fast=false"),
    ]
    assert beside(first, ["optim.amsgrad=false"]) == ["adapter=lora", "adapter.r=4", "optim.amsgrad=false"]


@pytest.mark.parametrize(
    ("speeds", "said"),
    [
        ([(100, 120), (50, 55)], r"1\.150 of A's tokens/s \(1\.100 to 1\.200 in 2 pairs\)"),
        ([(100, 90), (100, 120), (100, 101)], r"1\.010 .* in 3 pairs; they cannot be told apart\)"),
        ([(100, 300)], "one pair tells nothing of the spread"),
    ],
)
def test_a_difference_is_told_by_neighbours_and_only_where_all_agree(speeds: list[tuple[int, int]], said: str) -> None:
    a, b = ([{"tokens_per_s": pair[i], "peak_mb": 100.0 * (i + 1)} for pair in speeds] for i in (0, 1))
    assert pytest.approx(2) == float(compared(a, b).rpartition("and ")[2].split()[0])
    assert re.search(said, compared(a, b))
