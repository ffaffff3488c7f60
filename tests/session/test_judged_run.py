"""``loop.average`` and ``loop.patience`` through ``lowrank.train``: what is judged and saved, and what ends a run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SMALL, write_rows
from safetensors.torch import load_file
from torch import Tensor

import lowrank
from lowrank import assemble
from lowrank.train import checkpoint

STEPS, DECAY = 6, 0.7
RUN = ("model=tiny_llama", "eval.before=false", "eval.generate.limit=0", "eval.limit=2", "adapter.dropout=0.1")
AVERAGED = (*RUN, f"loop.steps={STEPS}", "optim.lr=1e-2", "eval.every=2", "checkpoint.every=1", "checkpoint.keep=99")
# Steps so small that no loss moves: the first evaluation is the best, the third makes two that were no better.
PATIENT = (*RUN, "loop.steps=20", "optim.lr=1e-30", "eval.every=2", "checkpoint.every=4", "checkpoint.keep=99")
STOP = 6


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    rows = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")

    def train(*overrides: str, folder: Path | None = None) -> Any:
        folder = folder or tmp_path_factory.mktemp("run") / "run"
        return lowrank.train([*SMALL, f"data.path={rows}", *overrides], folder)

    return train


@pytest.fixture(scope="module")
def averaged(trained: Callable[..., Any]) -> Any:
    return trained(*AVERAGED, f"loop.average={DECAY}")


@pytest.fixture(scope="module")
def plain(trained: Callable[..., Any]) -> Any:
    return trained(*AVERAGED)


@pytest.fixture(scope="module")
def stopped(trained: Callable[..., Any]) -> Any:
    return trained(*PATIENT, "loop.patience=2")


def saved_weights(run: Any) -> dict[str, Tensor]:
    return load_file(run.folder / "adapter" / "adapter.safetensors")


def raw_weights(run: Any, step: int) -> dict[str, Tensor]:
    return checkpoint.read_tensors(run.folder / "checkpoints" / f"step-{step:08d}", "adapter")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows(run: Any, event: str) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without what a clock says."""
    timed = ("seconds", "tokens_per_s", "peak_memory_mb", "predicted_peak_memory_mb")
    return [{k: v for k, v in row.items() if k not in timed} for row in run.metrics if row["event"] == event]


def broken_off(run: Any, folder: Path, step: int) -> Path:
    """A copy as a crash after the checkpoint of ``step`` would have left it."""
    copy = Path(shutil.copytree(run.folder, folder))
    for path in checkpoint.committed(copy / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(copy / "adapter")
    (copy / "summary.json").unlink()
    return copy


def test_the_average_is_what_is_saved_and_the_checkpoints_are_as_without_it(averaged: Any, plain: Any) -> None:
    factors = [DECAY ** (STEPS - k) for k in range(1, STEPS + 1)]
    weights = [raw_weights(averaged, k) for k in range(1, STEPS + 1)]
    for step, found in enumerate(weights, start=1):
        assert same(found, raw_weights(plain, step))
    for name, saved in saved_weights(averaged).items():
        mean = sum(f * w[name].double() for f, w in zip(factors, weights, strict=True)) / sum(factors)
        torch.testing.assert_close(saved.double(), mean, rtol=1e-5, atol=1e-7)
    assert not same(saved_weights(averaged), weights[-1])
    assert same(saved_weights(plain), weights[-1])


def test_the_average_is_what_is_evaluated(averaged: Any, plain: Any) -> None:
    assert rows(averaged, "step") == rows(plain, "step")
    assert [row["loss"] for row in rows(averaged, "eval")] != [row["loss"] for row in rows(plain, "eval")]
    opened = lowrank.open(averaged.folder)
    data = assemble.data(opened.config, opened.tokenizer)
    loss = assemble.evaluator(opened.config, opened.parts, data, opened.loaded).held_out(opened.model)["loss"]
    assert loss == pytest.approx(rows(averaged, "eval")[-1]["loss"], abs=1e-6)
    assert averaged.summary["eval"]["after"]["loss"] == rows(averaged, "eval")[-1]["loss"]


@pytest.mark.parametrize("step", [1, 4, STEPS])
def test_a_resumed_average_is_the_same_in_every_bit(
    trained: Callable[..., Any], averaged: Any, tmp_path: Path, step: int
) -> None:
    folder = broken_off(averaged, tmp_path / "run", step)
    resumed = trained(*AVERAGED, f"loop.average={DECAY}", "checkpoint.resume=true", folder=folder)
    assert same(saved_weights(resumed), saved_weights(averaged))
    for event in ("step", "eval"):
        assert rows(resumed, event) == rows(averaged, event)
    assert (folder / "digests.jsonl").read_bytes() == (averaged.folder / "digests.jsonl").read_bytes()
    assert resumed.summary["hashes"] == averaged.summary["hashes"]


def test_the_summary_tells_the_hash_of_the_weights_that_are_saved(averaged: Any) -> None:
    found = hashlib.sha256()
    for name, tensor in sorted(saved_weights(averaged).items()):
        raw = tensor.numpy().tobytes()
        found.update(f"{name} {len(raw)}\n".encode() + raw)
    assert averaged.summary["hashes"]["weights"] == found.hexdigest()


def test_patience_ends_a_run_that_is_done_and_has_its_last_checkpoint(stopped: Any) -> None:
    summary = stopped.summary
    assert (summary["status"], summary["steps"], summary["stopped_early"]) == ("done", STOP, STOP)
    assert checkpoint.committed(stopped.folder / "checkpoints")[-1].name == f"step-{STOP:08d}"
    assert [row["step"] for row in rows(stopped, "step")] == list(range(1, STOP + 1))
    assert [row["step"] for row in rows(stopped, "eval")] == [2, 4, 6]
    assert same(saved_weights(stopped), raw_weights(stopped, STOP))
    assert f"stopped early after step {STOP}" in (stopped.folder / "events.log").read_text()
    assert json.loads((stopped.folder / "digests.jsonl").read_text().splitlines()[-1])["step"] == STOP


@pytest.mark.parametrize("step", [4, STOP])
def test_a_run_that_is_resumed_stops_where_it_would_have(
    trained: Callable[..., Any], stopped: Any, tmp_path: Path, step: int
) -> None:
    folder = broken_off(stopped, tmp_path / "run", step)
    resumed = trained(*PATIENT, "loop.patience=2", "checkpoint.resume=true", folder=folder)
    assert (resumed.summary["status"], resumed.summary["stopped_early"]) == ("done", STOP)
    assert rows(resumed, "step") == rows(stopped, "step")
    assert rows(resumed, "eval") == rows(stopped, "eval")
    assert same(saved_weights(resumed), saved_weights(stopped))


def test_patience_may_be_given_up_on_resume(trained: Callable[..., Any], stopped: Any, tmp_path: Path) -> None:
    folder = broken_off(stopped, tmp_path / "run", STOP)
    summary = trained(*PATIENT, "checkpoint.resume=true", folder=folder).summary
    assert (summary["steps"], summary["stopped_early"]) == (20, None)


def test_what_adalora_has_pruned_is_pruned_in_the_average(trained: Callable[..., Any]) -> None:
    method = ("adapter=adalora", "adapter.init_r=4", "adapter.target_r=2", "adapter.delta_t=3", "loop.steps=20")
    run = trained(*RUN, *method, "loop.average=0.9", "checkpoint.every=20", "optim.lr=1e-2")
    raw, saved = raw_weights(run, 20), saved_weights(run)
    entries = [name for name in saved if name.endswith(".E")]
    assert sum(int((raw[name] != 0).sum()) for name in entries) == 2 * len(entries)
    assert all(torch.equal(saved[name] == 0, raw[name] == 0) for name in entries)
