"""``loop.prune`` beside the other jobs of a sweep, and ``experiment=lr_range``, through ``lowrank.train``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli import SMALL, write_rows

import lowrank
from lowrank.errors import ConfigError
from lowrank.report import lr_range

RUN = ("model=tiny_llama", "eval.before=false", "eval.generate.limit=0", "eval.limit=2", "loop.steps=6", "eval.every=2")
GOOD = ("optim.lr=1e-2", "checkpoint.every=0")
BAD = ("optim.lr=1e-30", "checkpoint.every=2", "loop.prune=2")  # whose loss never moves

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def trained(rows_file: Path) -> Callable[..., Any]:
    def train(folder: Path, *overrides: str) -> Any:
        return lowrank.train([*SMALL, f"data.path={rows_file}", *RUN, *overrides], folder)

    return train


@pytest.fixture(scope="module")
def sweep(trained: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs that learn, and one after them that does not."""
    folder = tmp_path_factory.mktemp("sweep")
    trained(folder / "one", *GOOD)
    trained(folder / "two", *GOOD, "loop.seed=1")
    trained(folder / "worse", *BAD)
    return folder


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_job_that_is_worse_than_the_others_at_the_same_step_ends_there_and_is_done(sweep: Path) -> None:
    found = summary(sweep / "worse")
    assert (found["status"], found["steps"]) == ("done", 2)
    assert found["pruned"]["step"] == found["pruned"]["jobs"] == 2
    assert found["eval"]["after"]["loss"] == found["pruned"]["best"] > found["pruned"]["median"]
    assert (sweep / "worse" / "adapter" / "adapter.safetensors").is_file()
    assert "pruned after step 2" in (sweep / "worse" / "events.log").read_text()
    assert summary(sweep / "one")["pruned"] is None


def test_resuming_a_pruned_job_leaves_it_and_without_the_key_it_goes_on(
    trained: Callable[..., Any], sweep: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sweep, tmp_path / "copy") / "worse"
    assert trained(folder, *BAD, "checkpoint.resume=true").summary["steps"] == 2
    freed = trained(folder, *BAD, "checkpoint.resume=true", "loop.prune=null").summary
    assert (freed["steps"], freed["pruned"]) == (6, None)


@pytest.mark.parametrize("change", ["unfinished", "other examples", "other data", "torn"])
def test_only_finished_jobs_that_were_measured_alike_count(
    trained: Callable[..., Any], sweep: Path, tmp_path: Path, change: str
) -> None:
    shutil.copytree(sweep, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "worse")
    one = tmp_path / "copy" / "one"
    match change:
        case "unfinished":
            (one / "summary.json").write_text(json.dumps(summary(one) | {"status": "failed"}))
        case "other examples":
            config = one / "config.yaml"
            config.write_text(config.read_text().replace("limit: 2\n", "limit: 1\n"))
        case "other data":
            identity = one / "identity.json"
            identity.write_text(identity.read_text().replace('"data": "', '"data": "0'))
        case "torn":
            (one / "summary.json").write_text('{"status": "do')
    assert trained(tmp_path / "copy" / "next", *BAD).summary["pruned"] is None


def test_pruning_needs_evaluations_to_judge_by(trained: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loop\.prune: 2 .*eval\.every"):
        trained(tmp_path / "run", *BAD, "eval.every=0")


@pytest.fixture(scope="module")
def ranged(rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    # 1.05 is what so small a model can run away by
    more = ("model=tiny_llama", f"data.path={rows_file}", "loop.steps=60", "loop.diverged=1.05", "eval.limit=2")
    return lowrank.train(["experiment=lr_range", *SMALL, *more, "optim.lr=100"], tmp_path_factory.mktemp("range") / "r")


def test_a_range_test_ends_when_the_loss_runs_away_and_says_which_rate_to_take(ranged: Any) -> None:
    told = ranged.summary
    assert told["status"] == "done"
    assert told["diverged"] == told["steps"] < 60
    rates = [row["lr"] for row in ranged.metrics if row["event"] == "step"]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(1e-4)
    assert rates[0] < told["lr_range"]["steepest"] <= told["lr_range"]["lowest"] < rates[-1]
    assert "fell fastest" in lr_range.line(told)


def test_its_report_has_the_plot(ranged: Any) -> None:
    page = (ranged.folder / "report.html").read_text()
    assert "Learning-rate range test" in page
    assert "falls fastest" in page
