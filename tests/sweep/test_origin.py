"""What a job's folder is named after: all that its result depends on, and nothing else."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from cli import write_rows

from lowrank.compose import compose
from lowrank.models import tiny
from lowrank.session.identity import FREE
from lowrank.sweep import origin
from lowrank.sweep.names import file_name, sweep_name
from lowrank.sweep.origin import UNTOUCHED, Origin

JOB = ("model=tiny_llama", "data=jsonl", "data.fields.response=output")


def made(rows: Path, *more: str) -> Origin:
    return Origin.of(compose([*JOB, f"data.path={rows}", *more]))


@pytest.mark.parametrize(
    "change", ["optim.lr=1e-3", "adapter.r=4", "loop.seed=1", "eval.limit=1", "loop.on_nonfinite=skip", "data.limit=4"]
)
def test_another_setting_is_another_job(change: str, rows: Path) -> None:
    assert made(rows, change).differing(made(rows)) == ["settings"]
    assert made(rows, change).digest != made(rows).digest


@pytest.mark.parametrize(
    "change", ["checkpoint.every=7", "track=tensorboard", "loop.max_seconds=9", "loop.profile=2", "sweep.metric=a"]
)
def test_what_cannot_change_a_result_is_no_part_of_it(change: str, rows: Path) -> None:
    assert made(rows, change) == made(rows)


def test_nothing_is_left_out_that_a_resumed_run_would_refuse() -> None:
    assert set(UNTOUCHED) <= set(FREE)


def test_of_a_data_file_its_bytes_count_and_not_its_place(rows: Path, tmp_path: Path) -> None:
    assert made(Path(shutil.copy(rows, tmp_path / "copy.jsonl"))) == made(rows)
    other = write_rows(tmp_path / "other.jsonl", 19)
    assert made(other).differing(made(rows)) == ["data"]
    before = made(other)
    write_rows(other, 18)
    assert made(other).differing(before) == ["data"]
    assert made(tmp_path / "missing.jsonl").data == "unreadable none"


def test_of_a_user_s_own_adapter_the_source_counts(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "edited_adapter.py"
    found = []
    for note in ("", "# edited\n"):
        path.write_text(f"from lowrank.adapters import LoRA\n{note}class Mine(LoRA): pass\n")
        found.append(made(rows, "adapter._target_=edited_adapter.Mine"))
    del sys.modules["edited_adapter"]
    assert found[1].differing(found[0]) == ["code"]
    assert found[0].differing(made(rows)) == ["settings", "code"]


def test_of_a_model_s_folder_its_files_count(rows: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.folder("tiny_llama"), tmp_path / "model")
    config = (*JOB[1:], f"data.path={rows}", "model=hf", f"model.name={folder}")
    before = Origin.of(compose([*config]))
    (folder / "more.safetensors").write_bytes(b"1")
    assert Origin.of(compose([*config])).differing(before) == ["base"]


def test_a_sweep_s_folder_is_the_same_for_the_same_jobs_and_readable() -> None:
    command = ["model=tiny_llama", "adapter.r=4,16", "optim.lr=choice(1e-3,1e-4)"]
    name = sweep_name(command)
    assert name.startswith("adapter.r=4_16_optim.lr=choice_1e-3_1e-4-")
    aside = ["hydra.launcher.n_jobs=2", "sweep.metric=eval.after.loss", "checkpoint.every=5", "track=wandb"]
    assert sweep_name([*command, *aside]) == name
    assert sweep_name([*command, "loop.seed=1"]) != name
    assert sweep_name(["adapter.targets=[q_proj,v_proj]", "adapter.r=4,8"]).startswith("adapter.r=4_8-")


def test_names_are_file_names_and_hold_no_secret() -> None:
    assert file_name("a/../b c,d") == "a_.._b_c_d"
    assert file_name("") == "job"
    assert len(file_name("x" * 500)) == 60
    assert "hf_" not in sweep_name(["data.path=hf_PlantedOnTheCommandLine1,b"])


def test_the_origin_imports_no_torch_at_its_top() -> None:
    assert "import torch" not in Path(origin.__file__).read_text().split("def ")[0]
