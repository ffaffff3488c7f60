"""``python train.py -m``: real runs by the isolated launcher."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from cli import SMALL, train, write_rows

JOB = (
    *(*SMALL, "model=tiny_llama", "loop.steps=2", "checkpoint.every=1", "adapter.dropout=0.1"),
    *("eval.before=false", "eval.generate.limit=0", "loop.seed=1,2"),
)


def swept(folder: Path, *more: str) -> CompletedProcess[str]:
    where = (f"data.path={folder / 'rows.jsonl'}", f"hydra.sweep.dir={folder / 'sweep'}")
    return train("-m", *JOB, *where, *more, LOWRANK_CACHE=str(folder / "cache"))


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("sweep/*/summary.json")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs, one after the other."""
    folder = tmp_path_factory.mktemp("alone")
    write_rows(folder / "rows.jsonl")
    done = swept(folder, "hydra.launcher.threads=1")
    assert done.returncode == 0, done.stderr
    return folder


def test_what_a_job_computes_does_not_depend_on_how_many_run_beside_it(alone: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    done = swept(tmp_path, "hydra.launcher.n_jobs=2", "hydra.launcher.threads=1")
    assert done.returncode == 0, done.stderr
    both = [{name: told["hashes"] for name, told in summaries(folder).items()} for folder in (alone, tmp_path)]
    assert len(both[0]) == 2
    assert both[0] == both[1]
    assert all(told["threads"] == 1 for told in summaries(tmp_path).values())
    assert all("step 2/2" in path.read_text() for path in tmp_path.glob("sweep/*/output.log"))


def test_the_same_command_again_runs_what_is_missing(alone: Path) -> None:
    before = summaries(alone)
    done = swept(alone, "hydra.launcher.threads=1", "hydra.launcher.n_jobs=2", "sweep.metric=eval.after.loss")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped") == 2
    assert summaries(alone) == before


@pytest.mark.slow  # of the worker itself there are faster ones
def test_a_resident_base_changes_no_bit(alone: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    done = swept(tmp_path, "sweep.resident=true", "hydra.launcher.threads=1")
    assert done.returncode == 0, done.stderr
    both = [{name: told["hashes"] for name, told in summaries(folder).items()} for folder in (alone, tmp_path)]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+sweep.metrik=a", "sweep.metrik: unknown key. Did you mean 'metric'? Allowed: together, metric, resident.\n"),
        ("hydra.launcher.n_jobs=0", "hydra.launcher.n_jobs: 0 is not allowed; a positive integer, or null.\n"),
        ("+hydra.launcher.jobs=2", "hydra.launcher.jobs: unknown key. Did you mean 'n_jobs'? Allowed: n_jobs, threads"),
    ],
)
def test_a_launcher_s_misspelt_key_or_wrong_value_stops_it_with_2(override: str, said: str, tmp_path: Path) -> None:
    done = swept(tmp_path, override)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_metric_that_no_job_has_fails_each_with_what_there_is(alone: Path) -> None:
    done = swept(alone, "hydra.launcher.threads=1", "sweep.metric=eval.after.los")
    assert done.returncode == 1
    assert done.stderr.startswith("2 of 2 jobs failed:\n")
    assert "sweep.metric: no 'eval.after.los' in summary.json (there: loss, perplexity" in done.stderr
