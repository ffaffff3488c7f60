"""A worker: what it answers, how it ends, and that a job in it is what it would be in a process of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import SMALL, train
from serving import Worker, job, serving

from lowrank.sweep.settings import Settings

pytestmark = pytest.mark.usefixtures("cache")
QUICK = ("model=tiny_llama", *SMALL, "loop.steps=4", "eval.before=false", "eval.generate.limit=0")
DROPPING = ("adapter.dropout=0.1", "adapter.r=2")


@pytest.fixture(scope="module")
def worker(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One that several tests send jobs to: that it serves after each is what they say together."""
    with serving(tmp_path_factory.mktemp("worker") / "output.log") as found:
        yield found
    assert found.process.returncode == 0


def outcome(folder: Path) -> tuple[Any, ...]:
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["step"], row["loss"], row.get("norm")) for row in rows if "loss" in row]
    identity = json.loads((folder / "identity.json").read_text())["identity"]
    adapter = (folder / "adapter" / "adapter.safetensors").read_bytes()
    return summary["hashes"], summary["eval"]["after"], steps, identity, adapter


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_later_job_is_to_the_bit_that_of_a_process_of_its_own(worker: Worker, rows: Path, tmp_path: Path) -> None:
    before = (*QUICK, f"data.path={rows}")
    [told] = worker.run(job(tmp_path / "first", *before, "adapter=dora", "loop.micro_batch=5"))
    assert told == {"folder": str(tmp_path / "first"), "code": 0, "cause": ""}
    worker.run(job(tmp_path / "kept", *before, *DROPPING))
    assert train(*before, *DROPPING, f"hydra.run.dir={tmp_path / 'alone'}").returncode == 0

    assert outcome(tmp_path / "kept") == outcome(tmp_path / "alone")
    opened = [line for line in (tmp_path / "kept" / "events.log").read_text().splitlines() if "opened by" in line]
    assert len(opened) == 1


def test_errors_are_told_with_the_code_of_a_process_and_the_next_job_runs(
    worker: Worker, rows: Path, tmp_path: Path
) -> None:
    plain = (*QUICK, f"data.path={rows}")
    unknown = job(tmp_path / "unknown", *plain)
    unknown["config"]["optim"]["lrr"] = 1
    gone = job(tmp_path / "gone", *plain, f"data.path={tmp_path / 'none.jsonl'}")
    wild = job(tmp_path / "wild", *plain, "optim.lr=1e38")
    answers = [worker.run(one)[0] for one in (unknown, gone, wild, job(tmp_path / "good", *plain))]

    assert [answer["code"] for answer in answers] == [2, 4, 5, 0]
    assert answers[0]["cause"].startswith("optim.lrr: unknown key. Did you mean 'lr'?")
    assert "none.jsonl" in answers[1]["cause"]
    assert "loss is nan" in answers[2]["cause"] or "not finite" in answers[2]["cause"]
    assert [path.exists() for path in (tmp_path / "unknown", tmp_path / "gone")] == [False, False]
    assert summary(tmp_path / "wild")["status"] == "failed"
    assert summary(tmp_path / "good")["status"] == "done"


@pytest.mark.slow
def test_peaks_are_each_jobs_own_and_predicted_as_in_a_fresh_process(
    worker: Worker, rows: Path, tmp_path: Path
) -> None:
    plain = (*QUICK, f"data.path={rows}", "data.max_length=512", "loop.fast=false", "loop.steps=1")
    for name, size in (("small", 1), ("large", 16), ("again", 1)):
        full = ("adapter=full", "loop.average=0.9") if name == "large" else ()
        worker.run(job(tmp_path / name, *plain, f"loop.micro_batch={size}", *full))
    small, large, again = (summary(tmp_path / name) for name in ("small", "large", "again"))

    assert again["peak_memory_mb"] <= large["peak_memory_mb"]
    assert again["peak_memory_mb"] == pytest.approx(small["peak_memory_mb"], rel=0.05)
    assert again["predicted_peak_memory_mb"] == pytest.approx(small["predicted_peak_memory_mb"], rel=0.05)


def test_what_jobs_print_goes_where_the_request_says(worker: Worker, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "said" / "output.log"
    worker.run(job(tmp_path / "run", *QUICK, f"data.path={rows}"), output=output)

    text = output.read_text()
    assert "sites" in text  # standard error's
    assert f"run directory {tmp_path / 'run'}" in text  # standard output's


def test_a_signal_stops_the_job_as_it_stops_a_run_and_the_worker_with_it(rows: Path, tmp_path: Path) -> None:
    long = job(tmp_path / "run", *QUICK, f"data.path={rows}", "loop.steps=100000", "checkpoint.every=50000")
    with serving(tmp_path / "output.log") as worker:
        worker.send(long)
        while not (tmp_path / "run" / "metrics.jsonl").exists() or not summary_rows(tmp_path / "run"):
            time.sleep(0.01)
        code = worker.stop(signal.SIGTERM)
        [told] = worker.told()

    assert code == told["code"] == 130
    assert "checkpoint.resume=true continues it" in told["cause"]
    assert summary(tmp_path / "run")["status"] == "interrupted"
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_signal_ends_a_worker_that_has_nothing_to_do(rows: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "output.log") as worker:
        worker.run(job(tmp_path / "run", *QUICK, f"data.path={rows}"))
        assert worker.stop(signal.SIGINT) == 130


def summary_rows(folder: Path) -> int:
    return (folder / "metrics.jsonl").read_bytes().count(b"\n")


def test_what_a_job_sets_for_the_whole_process_is_put_back(tmp_path: Path) -> None:
    before = Settings.now()
    drawn = [torch.rand(1).item(), random.random(), np.random.rand()]
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
    os.environ["LOWRANK_OF_A_JOB"] = "1"
    os.chdir(tmp_path)
    warnings.simplefilter("ignore")
    before.put_back()

    assert [torch.rand(1).item(), random.random(), np.random.rand()] == drawn
    assert Settings.now().numbers == before.numbers
    assert (os.getcwd(), warnings.filters) == (before.place, before.filters)
    assert "LOWRANK_OF_A_JOB" not in os.environ
