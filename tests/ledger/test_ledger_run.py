"""``plan=true`` and a run's ``ledger.json``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli import SMALL, train, write_rows
from deep import folder

from lowrank import compose, config, run
from lowrank.errors import ConfigError, RefusedError
from lowrank.ledger.ledger import PARTS

pytestmark = pytest.mark.usefixtures("cache")


def told(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "ledger.json").read_text())
    return found


def overrides(rows: Path, *more: str) -> list[str]:
    return [*SMALL, "model=tiny_llama", f"data.path={rows}", "loop.steps=2", "checkpoint.every=1", *more]


def test_the_dry_run_prints_plan_and_ledger_and_reads_no_weight(tmp_path: Path) -> None:
    rows, model = write_rows(tmp_path / "rows.jsonl"), tmp_path / "model"
    shutil.copytree(folder(tmp_path / "whole"), model)
    for file in model.glob("*.safetensors"):
        file.unlink()
    own = ("model=hf", f"model.name={model}", f"data.path={rows}", f"hydra.run.dir={tmp_path / 'run'}")
    done = train(*SMALL, *own, "plan=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("trainable parameters") < done.stdout.index("FLOPs a token")
    predicted = told(tmp_path / "run")["predicted"]
    assert predicted["peak_mb"] > 0
    assert predicted["flops_per_token"] == predicted["flops"]["forward"] + predicted["flops"]["backward"]
    assert list(predicted["parts_mb"]) == list(PARTS)
    assert {path.name for path in (tmp_path / "run").iterdir() if path.name[0] != "."} == {"ledger.json"}
    assert train(*SMALL, *own).returncode == 2  # which needs the weights


def test_a_run_writes_what_it_took_beside_what_was_predicted(tmp_path: Path, rows: Path) -> None:
    done = run.train(compose.compose(overrides(rows)), tmp_path / "run")
    found = told(done.folder)
    measured, predicted = found["measured"], found["predicted"]
    assert measured["peak_mb"] == done.summary["peak_memory_mb"]
    assert predicted["peak_mb"] == done.summary["predicted_peak_memory_mb"]
    for part in ("weights", "adapters", "quantisation", "buffers"):
        assert measured["parts_mb"][part] == predicted["parts_mb"][part]
    assert measured["parts_mb"]["optimizer"] == pytest.approx(predicted["parts_mb"]["optimizer"], rel=0.01)
    assert measured["parts_mb"]["gradients"] == pytest.approx(predicted["parts_mb"]["gradients"], rel=0.05)


def test_a_dry_run_and_the_run_after_it_predict_the_same(tmp_path: Path, rows: Path) -> None:
    settings = compose.compose(overrides(rows))
    list(run.plan(settings, tmp_path / "run"))
    before = told(tmp_path / "run")["predicted"]
    run.train(settings, tmp_path / "run")
    after = told(tmp_path / "run")["predicted"]
    for one in (before, after):
        for name in ("peak_mb", "parts_mb", "phases_mb", "tokens_per_s"):  # the interpreter has grown meanwhile
            one.pop(name, None)
    assert before == after


def test_what_was_measured_survives_a_resume(tmp_path: Path, rows: Path) -> None:
    run.train(compose.compose(overrides(rows)), tmp_path / "run")
    path = tmp_path / "run" / "ledger.json"
    found = json.loads(path.read_text())
    found["measured"]["peak_mb"] = 1e6  # of an earlier process that took more
    path.write_text(json.dumps(found))
    run.train(compose.compose(overrides(rows, "loop.steps=3", "checkpoint.resume=true")), tmp_path / "run")
    assert told(tmp_path / "run")["measured"]["peak_mb"] == 1e6


def test_a_directory_that_holds_a_run_is_not_planned_over(tmp_path: Path, rows: Path) -> None:
    run.train(compose.compose(overrides(rows)), tmp_path / "run")
    with pytest.raises(RefusedError, match="holds a run already"):
        list(run.plan(compose.compose(overrides(rows)), tmp_path / "run"))


def test_plan_is_true_or_false_and_no_part_of_a_configuration(rows: Path) -> None:
    node = compose.compose_node(overrides(rows, "plan=true"))
    assert config.planning(node)
    assert "plan" not in config.parse(node).to_dict()
    with pytest.raises(ConfigError, match="plan: 'maybe' is not allowed; true or false"):
        config.planning(compose.compose_node(overrides(rows, "plan=maybe")))
