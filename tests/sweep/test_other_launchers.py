"""joblib's launcher, submitit's local one and Optuna's sweeper: jobs are runs as any other, and errors name them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli import SMALL, train

QUICK = (*SMALL[:5], "model=tiny_llama", "eval.before=false", "eval.generate.limit=0", "checkpoint.every=0")


def needs(plugin: str) -> pytest.MarkDecorator:
    lacking = importlib.util.find_spec(f"hydra_plugins.{plugin}") is None
    return pytest.mark.skipif(lacking, reason=f"{plugin} is not installed: pip install 'lowrank[sweep]'")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "sweep"


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/summary.json"))}


@pytest.mark.slow
@needs("hydra_joblib_launcher")
def test_joblib_runs_jobs_side_by_side_and_a_failed_one_is_named_with_its_exit_code(folder: Path, rows: Path) -> None:
    paths = f"data.path={rows},{rows.parent / 'missing.jsonl'}"
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={folder}")
    found = train("-m", *launcher, paths, *QUICK, "loop.steps=2")
    assert found.returncode == 4
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith(str(folder))
    assert "missing.jsonl" in last
    assert "Traceback" not in found.stderr
    assert [one["status"] for one in summaries(folder).values()] == ["done"]


@needs("hydra_submitit_launcher")
def test_submitit_runs_two_jobs_through_its_local_executor(folder: Path, rows: Path) -> None:
    launcher = ("hydra/launcher=submitit_local", f"hydra.sweep.dir={folder}")
    found = train("-m", *launcher, "loop.seed=0,1", f"data.path={rows}", *QUICK, "loop.steps=2")
    assert found.returncode == 0, found.stderr
    told = summaries(folder)
    assert sorted(one["seed"] for one in told.values()) == [0, 1]
    assert {one["status"] for one in told.values()} == {"done"}
    assert {path.name for path in folder.glob(".submitit/*")} >= {name.rpartition("-")[2] for name in told}


SEARCH = ("experiment=optuna_lora", "loop.prune=null", "eval.every=0", "adapter.targets=q_proj", "loop.steps=2")
TWO = ("hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=2")  # which draws one of each learning rate


@needs("hydra_optuna_sweeper")
def test_optuna_counts_a_trial_that_is_not_finite_as_failed_and_goes_on(folder: Path, rows: Path) -> None:
    rates = "optim.lr=1e-3,1e30"
    found = train("-m", *SEARCH, *QUICK, *TWO, rates, f"data.path={rows}", f"hydra.sweep.dir={folder}")
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    told = {one["status"]: name for name, one in summaries(folder).items()}
    assert set(told) == {"done", "failed"}
    assert told["failed"] in found.stderr
    best = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert best["best_value"] == summaries(folder)[told["done"]]["eval"]["after"]["loss"]
    assert float(best["best_params"]["optim.lr"]) == 1e-3


@pytest.mark.slow
@needs("hydra_optuna_sweeper")
def test_the_same_search_again_trains_nothing_that_is_done_and_finds_the_same(folder: Path, rows: Path) -> None:
    command = ("-m", *SEARCH, *QUICK, *TWO, f"data.path={rows}", f"hydra.sweep.dir={folder}", "optim.lr=1e-3,2e-3")
    results = folder / "optimization_results.yaml"
    assert train(*command).returncode == 0
    best, before = results.read_text(), {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    results.unlink()
    next(iter(before)).unlink()  # as if the sweep had been killed in this one
    again = train(*command)
    assert again.returncode == 0, again.stderr
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    assert set(after) == set(before)
    assert len([path for path in after if after[path] != before[path]]) == 1
    assert results.read_text() == best


@pytest.mark.slow
def test_a_sweep_prunes_the_job_that_learns_nothing(folder: Path, rows: Path) -> None:
    pruning = ("loop.prune=2", "loop.steps=6", "eval.every=2", "optim.lr=1e-2,2e-2,1e-30", "hydra.launcher.n_jobs=1")
    found = train("-m", *pruning, *QUICK, f"data.path={rows}", f"hydra.sweep.dir={folder}")
    assert found.returncode == 0, found.stderr
    steps = {name.partition("_")[0]: (one["steps"], one["status"]) for name, one in summaries(folder).items()}
    assert sorted(steps.values()) == [(2, "done"), (6, "done"), (6, "done")]
