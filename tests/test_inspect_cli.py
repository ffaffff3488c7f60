"""`lowrank inspect plan` and `lowrank inspect adapter` on run directories, and what a run writes for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli import SMALL, lowrank, write_rows

import lowrank as api
from lowrank import cli
from lowrank.adapters.plan import InjectionPlan

pytestmark = pytest.mark.usefixtures("cache")


MIXED = "adapter.targets={*.q_proj:{r:8},*.v_proj@0:{},*.mlp.*:{_target_:lowrank.adapters.Full}}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few steps each: LoRA, LoRA of another rank and seed, LoRA and Full in one model, and LoRA over NF4."""
    folder = tmp_path_factory.mktemp("runs")
    rows = write_rows(folder / "rows.jsonl")
    more = [*SMALL, "model=tiny_llama", f"data.path={rows}", "loop.steps=2", "eval.before=false"]
    chosen = {"one": [], "other": ["adapter.r=4", "loop.seed=1"], "mixed": [MIXED], "nf4": ["quant=nf4"]}
    for name, overrides in chosen.items():
        api.train([*more, *overrides], folder / name)
    return {name: folder / name for name in chosen}


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    cli.main(["inspect", *map(str, words)])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", *map(str, words)])
    return int(str(ended.value.code)), capsys.readouterr().err


def test_a_run_s_plan_is_the_one_it_was_trained_by(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for folder in runs.values():
        run = api.open(folder)
        assert run.recorded_plan == run.plan
        assert said(capsys, "plan", folder) == (folder / "plan.txt").read_text() == f"{run.plan}\n"
    methods = {row.path: (row.method, row.options.get("r")) for row in api.open(runs["mixed"]).plan.rows}
    assert methods["model.layers.1.self_attn.q_proj"] == ("LoRA", 8)
    assert methods["model.layers.0.self_attn.v_proj"] == ("LoRA", 16)
    assert methods["model.layers.1.mlp.up_proj.weight"] == ("Full", None)
    assert "model.layers.1.self_attn.v_proj" not in methods


@pytest.mark.parametrize("name", ["summary.json", "adapter/adapter.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_is_named(
    name: str, content: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(runs["one"], tmp_path / "run")
    (folder / name).write_text(content)
    code, text = refused(capsys, "adapter", folder)
    assert (code, text.count("\n")) == (6, 1)
    assert text.startswith(f"{folder / name}: cannot be read")


def test_two_runs_plans_are_compared(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    done = lowrank("inspect", "plan", str(runs["one"]), str(runs["other"]))
    assert (done.returncode, done.stderr) == (0, "")
    assert "  *.q_proj (2 sites): r 16 → 4; parameters 2,048 → 512\n" in done.stdout
    assert said(capsys, "plan", runs["one"], runs["one"]) == "the plans are the same\n"
    text = said(capsys, "plan", runs["one"], runs["mixed"])
    assert "  *.up_proj.weight (2 sites): Full on 128×64, 8,192 parameters\n" in text
    assert "  model.layers.1.self_attn.v_proj: LoRA(r=16" in text


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 2, "no plan.json there"),
        ("{", 6, "cannot be read"),
        ("[]", 6, "cannot be read"),
        ('{"rows": [{"path": 3}], "total_parameters": 1, "notes": []}', 6, "not a run's plan"),
    ],
)
def test_a_run_without_a_readable_plan_is_named(
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    code: int,
    words: str,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs["one"], copy)
    (copy / "plan.json").unlink()
    if content is not None:
        (copy / "plan.json").write_text(content)
    ended, text = refused(capsys, "plan", runs["one"], copy)
    assert ended == code
    assert str(copy) in text
    assert words in text
    assert len(text.splitlines()) == 1


def test_a_run_that_is_not_there_is_said_and_overrides_are_still_plans(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, "plan", runs["one"], "nowhere") == (
        2,
        "nowhere: not a run directory (no config.yaml there).\n",
    )
    assert refused(capsys, "plan", *runs.values())[1].startswith("inspect plan: 4 runs are not allowed; one, or two")
    assert said(capsys, "plan", "model=tiny_llama", "adapter.r=4").count("LoRA(r=4,") == 14


def test_what_was_learnt_is_shown_as_the_run_wrote_it(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    done = lowrank("inspect", "adapter", str(runs["one"]))
    assert (done.returncode, done.stderr) == (0, "")
    assert "mean of down_proj (2)" in done.stdout
    for name, folder in runs.items():
        shown = json.loads(said(capsys, "adapter", folder, "--json"))
        written = json.loads((folder / "spectra.json").read_text())
        for ours, theirs in zip(shown["models"][0]["sites"], written["models"][0]["sites"], strict=True):
            assert ours["path"] == theirs["path"]
            assert ours["change"] == pytest.approx(theirs["change"])
            assert ours["singular"] == pytest.approx(theirs["singular"], rel=1e-5, abs=1e-12)
            assert ours["change"] > 0
        assert bool(shown["models"][0]["notes"]) == (name == "mixed")


def test_two_runs_on_one_base_are_compared_and_on_two_are_refused(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tree = json.loads(said(capsys, "adapter", runs["one"], runs["other"], "--json"))
    assert len(tree["models"]) == 2
    assert len(tree["overlaps"]) == 14
    assert all(0 <= value <= 1 + 1e-9 for one in tree["overlaps"] for row in one["left"] for value in row)
    assert "φ(1,1) left" in said(capsys, "adapter", runs["one"], runs["other"])
    code, text = refused(capsys, "adapter", runs["one"], runs["nf4"])
    assert code == 6
    assert text.startswith(f"{runs['one']} was trained on base ")
    assert "q_proj" in text
    assert refused(capsys, "adapter") == (2, "inspect adapter: 0 runs are not allowed; one, or two to compare.\n")


def test_the_plan_of_a_run_is_in_its_directory_whole(runs: dict[str, Path]) -> None:
    for folder in runs.values():
        recorded = InjectionPlan.from_dict(json.loads((folder / "plan.json").read_text()))
        assert recorded == InjectionPlan.from_dict(json.loads((folder / "adapter/adapter.json").read_text())["plan"])
