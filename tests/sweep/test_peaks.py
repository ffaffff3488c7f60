"""How many jobs at a time: by what the user says, the cores, and the ledger's memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cli import SMALL
from jobs import jobs

from lowrank.compose import compose
from lowrank.sweep import lanes as of_lanes
from lowrank.sweep.job import Job
from lowrank.sweep.lanes import lanes
from lowrank.sweep.peaks import Peaks, weighty


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Eight jobs, on a machine of six cores."""
    monkeypatch.setattr(of_lanes, "cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return jobs(tmp_path, *["done"] * 8)


@pytest.mark.parametrize(
    ("n_jobs", "threads", "count", "weighed"),
    [(None, None, 1, False), (None, 2, 3, True), (None, 9, 1, False), (4, None, 4, False), (4, 3, 4, False)],
)
def test_as_many_lanes_as_there_are_cores_for_or_the_user_says(
    n_jobs: int | None, threads: int | None, count: int, weighed: bool, made: list[Job]
) -> None:
    found = lanes(made, n_jobs, threads)
    assert (len(found.each), found.weighed) == (count, weighed)
    pinned = {str(threads)} if threads else set()
    assert all(set(lane.variables.values()) == pinned for lane in found.each)


def test_a_plain_run_s_own_number_of_threads_counts(made: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert len(lanes(made, None, None).each) == 2


def test_a_gpu_each_where_jobs_would_take_one(made: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_lanes, "visible", lambda jobs: ["2", "GPU-1a"])
    assert [lane.variables["CUDA_VISIBLE_DEVICES"] for lane in lanes(made, None, None).each] == ["2", "GPU-1a"]
    shared = lanes(made, 3, None)
    assert [lane.variables["CUDA_VISIBLE_DEVICES"] for lane in shared.each] == ["2", "GPU-1a", "2"]


def test_jobs_that_take_the_same_are_predicted_once(rows: Path) -> None:
    def key(*more: str) -> str:
        return weighty(compose([*SMALL, "model=tiny_llama", f"data.path={rows}", *more]).to_dict())

    assert key() == key("optim.lr=1e-3", "loop.seed=4", "schedule=cosine")
    assert len({key(), key("adapter.r=3"), key("loop.micro_batch=1"), key("quant=nf4")}) == 4


def test_a_job_joins_others_where_the_ledger_says_that_there_is_room(rows: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    config = compose([*SMALL, "model=tiny_llama", f"data.path={rows}"]).to_dict()
    missing = {**config, "data": {**config["data"], "path": str(tmp_path / "missing.jsonl")}}
    kinds = (config, config, missing)
    three = [replace(job, config=one) for job, one in zip(jobs(tmp_path, "a", "b", "c"), kinds, strict=True)]
    peaks = Peaks(three, {"OMP_NUM_THREADS": "1"})
    try:
        assert not peaks.fits(0, [1])  # nothing is known yet
        until = time.monotonic() + 200
        while len(peaks.told) < 3 and time.monotonic() < until:
            peaks.read()
            time.sleep(0.05)
        room, one, refused = peaks.told
        assert refused == 0  # it fails by itself, and takes nothing
        assert 10**8 < one < 10**9
        assert peaks.fits(0, [1, 2]) == (2 * one <= room)
        assert not peaks.fits(0, [1] * (room // one))
    finally:
        peaks.close()
