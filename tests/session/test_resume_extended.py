"""Runs that are made longer, that are at their end, and directories that hold the remains of one."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SMALL
from safetensors.torch import load_file

import lowrank
from lowrank import compose, run
from lowrank.errors import ConfigError, RefusedError
from lowrank.schema import Config
from lowrank.train import checkpoint

RESUME = "checkpoint.resume=true"
BRIEF = ("model=tiny_llama", "loop.steps=4", "checkpoint.every=2", "eval.before=false", "eval.generate.limit=0")


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def done(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    lowrank.train([*SMALL, *BRIEF, f"data.path={rows}"], folder)
    return folder


@pytest.fixture
def folder(done: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(done, tmp_path / "run"))


@lru_cache
def composed(rows: Path) -> Config:
    return compose.compose([*SMALL, *BRIEF, f"data.path={rows}"])


@pytest.fixture
def go(rows: Path) -> Any:
    """What ``lowrank.train`` does, with Hydra asked once for what all these runs have in common."""
    return lambda folder, *overrides: run.train(compose.changed(composed(rows), [*overrides]), folder)


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("events.log", ".lock")]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def said(folder: Path) -> str:
    return (folder / "events.log").read_text()


# Longer


def test_a_finished_run_that_is_made_longer_goes_on_and_its_results_are_replaced(folder: Path, go: Any) -> None:
    before, old = content(folder), tensors(folder)
    ran = go(folder, RESUME, "loop.steps=6")
    assert [row["step"] for row in ran.metrics if row["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert (ran.summary["status"], ran.summary["steps"]) == ("done", 6)
    assert not same(old, tensors(folder))
    after = content(folder)
    for name in ("summary.json", "report.html", "spectra.json", "adapter/adapter.safetensors"):
        assert before[str(folder / name)][0] != after[str(folder / name)][0], name
    assert "steps: 6\n" in (folder / "config.yaml").read_text()
    # linear from 5e-4, warm-up 0: 4 → 6 steps
    assert (
        "4 → 6 steps: the learning rate of the 4 steps done was that of 4 steps (0.000125 at last); "
        "from step 5 on it is that of 6 (0.000167 at first).\n"
    ) in said(folder)
    assert [row["lr"] for row in ran.metrics if row["event"] == "step"][-2:] == pytest.approx([5e-4 / 3, 5e-4 / 6])


def test_a_constant_schedule_made_longer_is_the_longer_run(tmp_path: Path, go: Any) -> None:
    constant = ("schedule=constant", "adapter.dropout=0.1")
    go(tmp_path / "short", *constant)
    go(tmp_path / "short", *constant, RESUME, "loop.steps=6")
    assert "4 → 6 steps: the learning rate does not depend on it.\n" in said(tmp_path / "short")
    whole = go(tmp_path / "long", *constant, "loop.steps=6")
    assert same(tensors(tmp_path / "short"), tensors(whole.folder))


def test_epochs_may_grow_into_steps_and_back_as_long_as_it_is_no_less(folder: Path, go: Any) -> None:
    in_epochs = ("loop.steps=null", "loop.epochs=1")  # nine steps
    assert go(folder, RESUME, *in_epochs).summary["steps"] == 9
    assert go(folder, RESUME, "loop.steps=9").summary["steps"] == 9
    with pytest.raises(RefusedError, match=r"refused: loop\.epochs 1\.0 → 0\.5\. To accept") as error:
        go(folder, RESUME, "loop.steps=null", "loop.epochs=0.5", "checkpoint.allow=[optim]")
    assert error.value.exit_code == 6


def test_what_a_method_does_over_the_steps_is_said_to_change(tmp_path: Path, go: Any) -> None:
    adalora = ("adapter=adalora", "adapter.init_r=4", "adapter.target_r=2", "checkpoint.every=4")
    go(tmp_path / "run", *adalora)
    go(tmp_path / "run", *adalora, RESUME, "loop.steps=8")
    assert "; what AdaLoRA does over the steps is now that of 8.\n" in said(tmp_path / "run")


def test_a_run_is_opened_as_it_is_while_what_was_added_is_not_done(folder: Path, go: Any) -> None:
    old = tensors(folder)
    go(folder, RESUME, "loop.steps=10000", "checkpoint.every=1", "loop.max_seconds=1e-6")
    ran = lowrank.open(folder)
    assert (ran.summary["status"], ran.summary["steps"]) == ("interrupted", 5)
    assert same(tensors(folder), old)
    newest, _ = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    adapter = ran.model.model.layers[0].mlp.down_proj.adapter
    name = "model.layers.0.mlp.down_proj.adapter.B"
    assert torch.equal(adapter.B, load_file(newest / "adapter.safetensors")[name])
    assert not torch.equal(adapter.B, old[name])


def test_a_summary_of_before_the_extension_does_not_end_it(folder: Path, go: Any) -> None:
    summary = (folder / "summary.json").read_bytes()
    go(folder, RESUME, "loop.steps=10000", "checkpoint.every=1", "loop.max_seconds=1e-6")
    (folder / "summary.json").write_bytes(summary)  # as where the process was killed instead
    with pytest.raises(RefusedError, match=r"loop\.steps 10000 → 6"):
        go(folder, RESUME, "loop.steps=6")
    ran = go(folder, RESUME, "loop.steps=6", "checkpoint.allow=[loop.steps]")
    assert (ran.summary["status"], ran.summary["steps"]) == ("done", 6)


# Shorter


def test_shorter_is_drift_and_below_what_is_done_cannot_be(folder: Path, go: Any) -> None:
    with pytest.raises(RefusedError, match=r"^resume refused: loop.steps 4 → 3\. To accept: 'checkpoint.allow="):
        go(folder, RESUME, "loop.steps=3")
    before = content(folder)
    with pytest.raises(RefusedError, match=r"loop.steps 3 is below the 4 steps done\. Give at least 4, or begin anew"):
        go(folder, RESUME, "loop.steps=3", "checkpoint.allow=[loop.steps]")
    assert content(folder) == before


def test_shorter_to_what_is_done_ends_it_there(folder: Path, go: Any) -> None:
    go(folder, RESUME, "loop.steps=10000", "loop.max_seconds=1e-6")
    done = lowrank.open(folder).summary["steps"]
    ran = go(folder, RESUME, f"loop.steps={done}", "checkpoint.allow=[loop]")
    assert (ran.summary["status"], ran.summary["steps"]) == ("done", done)


# At its end, or at its beginning


@pytest.mark.parametrize(
    "free", [(), ("eval.every=1", "checkpoint.every=1", "loop.max_seconds=9")], ids=["as it was", "free"]
)
def test_resuming_a_finished_run_changes_nothing(folder: Path, go: Any, free: tuple[str, ...]) -> None:
    before = content(folder)
    assert go(folder, RESUME, *free).summary["status"] == "done"
    assert content(folder) == before


def test_a_finished_run_without_checkpoints_stays_as_it_is(tmp_path: Path, go: Any) -> None:
    none = "checkpoint.every=0"
    go(tmp_path / "run", none)
    before = content(tmp_path / "run")
    assert go(tmp_path / "run", none, RESUME).summary["status"] == "done"
    with pytest.raises(RefusedError, match=r"resume refused: optim\.lr 0\.0005 → 0\.1"):
        go(tmp_path / "run", none, RESUME, "optim.lr=0.1")
    with pytest.raises(RefusedError, match="this run is done, and left no checkpoint from which to go on"):
        go(tmp_path / "run", none, RESUME, "loop.steps=9")
    assert content(tmp_path / "run") == before


def test_with_nothing_to_resume_from_it_starts_at_step_1_and_says_so(tmp_path: Path, go: Any, done: Path) -> None:
    ran = go(tmp_path / "run", RESUME)
    assert "nothing to resume from; starting at step 1\n" in said(ran.folder)
    assert same(tensors(ran.folder), tensors(done))
    shutil.rmtree(ran.folder / "checkpoints")
    (ran.folder / "summary.json").unlink()  # killed before its first checkpoint
    again = go(ran.folder, RESUME, "optim.lr=1e-3")
    assert [row["step"] for row in again.metrics if row["event"] == "step"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "left", ["checkpoints", "config.yaml", "events.log", "identity.json", "adapter", "metrics.jsonl"]
)
def test_a_directory_with_the_remains_of_a_run_is_refused_and_left_as_it_is(
    done: Path, tmp_path: Path, go: Any, left: str
) -> None:
    copy = shutil.copytree if (done / left).is_dir() else shutil.copy2
    (tmp_path / "run").mkdir()
    copy(done / left, tmp_path / "run" / left)
    before = content(tmp_path / "run")
    with pytest.raises(
        RefusedError, match=rf"run: holds a run already \({left}\)\. To continue it: checkpoint\.resume=true"
    ):
        go(tmp_path / "run")
    assert content(tmp_path / "run") == before


def test_a_directory_with_other_things_in_it_is_used(tmp_path: Path, go: Any) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert go(tmp_path / "run").summary["status"] == "done"


def test_a_damaged_identity_is_named(folder: Path, go: Any) -> None:
    (folder / "identity.json").write_text("[")
    with pytest.raises((RefusedError, ConfigError), match=r"identity\.json: cannot be read"):
        go(folder, RESUME)


def test_what_a_run_went_through_stays_in_its_provenance(folder: Path, go: Any) -> None:
    go(folder, RESUME, "loop.steps=5", "optim.lr=1e-3", "checkpoint.allow=[optim.lr]")
    told = json.loads((folder / "identity.json").read_text())
    assert told["identity"]["optim.lr"] == 1e-3
    assert told["provenance"]["after_step"] == 4
    assert told["provenance"]["changed"]["optim.lr"] == "0.0005 → 0.001"
    assert len(told["earlier"]) == 1
    config = lowrank.open(folder).config
    assert (config.checkpoint.resume, config.checkpoint.allow) == (False, [])  # what was allowed once is not for ever
