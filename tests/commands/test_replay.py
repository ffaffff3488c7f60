"""``lowrank replay``: a run's first steps again, and the first bit that is another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli import SMALL, write_rows

import lowrank
from lowrank.cli import main
from lowrank.commands.replay import replay
from lowrank.errors import RefusedError
from lowrank.manifest import committed

RUN = (
    *("model=tiny_llama", "loop.steps=8", "loop.accumulate=2", "checkpoint.every=3"),
    *("eval.before=false", "eval.generate.limit=0", "eval.limit=2"),
)


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    rows = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")

    def train(*overrides: str, folder: Path | None = None) -> Path:
        folder = folder or tmp_path_factory.mktemp("run") / "run"
        lowrank.train([*SMALL, f"data.path={rows}", *RUN, *overrides], folder)
        return folder

    return train


@pytest.fixture(scope="module")
def whole(trained: Callable[..., Path]) -> Path:
    return trained("eval.every=2", "adapter.dropout=0.1")


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(path: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a step's row of a file of JSON lines."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(next(row for row in rows if row.get("step") == step and row.get("event", "step") == "step"))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit code and lines of ``lowrank replay``."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(folder)])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out.splitlines()


def test_a_run_comes_out_the_same_and_nothing_of_it_changes(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(whole)
    code, lines = command(whole, capsys)
    assert (code, content(whole)) == (0, before)
    assert lines[-1] == "8 steps replayed: losses, gradient norms and 28 tensors at 8 steps are bitwise equal"


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapter=full",),
        ("quant=nf4",),
        ("optim=adamw8bit", "optim.min_8bit_size=64"),
        ("loop.steps=null", "loop.epochs=2"),
        ("adapter=adalora", "adapter.init_r=4", "adapter.target_r=2", "adapter.delta_t=2", "loop.steps=20"),
        ("loop.average=0.9", "loop.patience=1", "eval.every=1", "optim.lr=1e-30"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_so_does_every_kind_of_run(trained: Callable[..., Path], overrides: tuple[str, ...]) -> None:
    found = replay(trained(*overrides), 6)
    assert found.equal, str(found)
    assert found.digests == found.steps > 1


def test_fewer_steps_are_compared_where_fewer_are_asked_for(whole: Path) -> None:
    found = replay(whole, 3)
    assert (found.equal, found.steps, found.digests) == (True, 3, 3)


def test_a_run_that_was_resumed_and_made_longer_is_replayed_from_its_start(
    trained: Callable[..., Path], copied: Path
) -> None:
    shutil.rmtree(copied / "checkpoints" / "step-00000008")
    assert committed(copied / "checkpoints")[-1].name == "step-00000006"
    (copied / "summary.json").unlink()
    longer = ("loop.steps=12", "checkpoint.allow=[loop.steps,steps]")
    trained("eval.every=2", "adapter.dropout=0.1", "checkpoint.resume=true", *longer, folder=copied)
    found = replay(copied, 6)
    assert (found.equal, found.steps) == (True, 6), str(found)
    assert replay(copied, 7).difference.startswith("step 7: lr differs")  # from there on the schedule is that of 12


def test_the_first_tensor_that_differs_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: list[str] = []

    def change(row: dict[str, Any]) -> None:
        names.extend(row["tensors"])
        for name in names[4:]:
            row["tensors"][name] = "0" * 16

    for step in (5, 6):
        rewrite(copied / "digests.jsonl", step, change)
    code, lines = command(copied, capsys)
    assert (code, lines[-1]) == (6, f"8 steps replayed: step 5: {names[4]} differs")


@pytest.mark.parametrize("figure", ["loss", "grad_norm", "lr", "target_tokens"])
def test_the_first_figure_that_differs_is_named_in_its_last_bit(copied: Path, figure: str) -> None:
    def change(row: dict[str, Any]) -> None:
        row[figure] *= 1 + 2**-52

    rewrite(copied / "metrics.jsonl", 4, change)
    assert replay(copied).difference.startswith(f"step 4: {figure} differs (")


def test_initial_weights_that_differ_are_said_to(copied: Path) -> None:
    names: list[str] = []

    def change(row: dict[str, Any]) -> None:
        names.extend(row["tensors"])
        row["tensors"][names[0]] = "0" * 16

    rewrite(copied / "digests.jsonl", 0, change)
    assert replay(copied).difference == f"step 0: {names[0]} differs before training"


def test_what_has_changed_since_is_told_first(copied: Path) -> None:
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    lines = str(replay(copied, 2)).splitlines()
    assert lines[0].startswith("since the run: ")
    assert "loop.seed 0 → 1" in lines[0]
    assert lines[1].startswith("2 steps replayed: step 0: model.layers.0.self_attn.q_proj.adapter.A differs")


@pytest.mark.parametrize("name", ["metrics.jsonl", "digests.jsonl"])
def test_a_run_that_recorded_no_step_is_refused(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(RefusedError, match=f"{name}: tells of no step"):
        replay(copied)


def test_a_run_finds_its_data_again_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    lowrank.train([*SMALL, "data.path=rows.jsonl", *RUN], tmp_path / "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert replay(tmp_path / "run", 1).equal
