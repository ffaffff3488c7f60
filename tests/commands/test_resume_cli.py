"""``lowrank resume RUN``: from anywhere, with what the run had, and with what is to differ."""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from cli import SMALL, run, write_rows
from safetensors.torch import load_file

import lowrank
from lowrank import cli, compose
from lowrank.record import source
from lowrank.run import train
from lowrank.schema import Config

OWN = "from lowrank.adapters import LoRA\nclass Own(LoRA):\n    '''LoRA.'''\n"
BRIEF = ("model=tiny_llama", "checkpoint.every=2", "eval.before=false", "eval.generate.limit=0", "loop.steps=4")
STOP = ("loop.steps=4", "checkpoint.every=1", "loop.max_seconds=1e-6")  # after its first step


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, in which a run is started; the test goes on in another one."""
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    write_rows(home / "rows.jsonl")
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return home


@lru_cache
def composed() -> Config:
    return compose.compose([*SMALL, *BRIEF, "data.path=rows.jsonl"])


def go(folder: Path, *overrides: str) -> lowrank.Run:
    """What ``lowrank.train`` does, with Hydra asked once for what all these runs have in common."""
    return train(compose.changed(composed(), [*overrides]), folder)


def resume(*arguments: object) -> int:
    try:
        cli.main(["resume", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


def test_a_stopped_run_ends_in_the_bits_of_one_that_was_not_from_another_folder_and_process(home: Path) -> None:
    whole = adapter(go(home.parent / "whole").folder)
    go(home / "run", *STOP)
    assert lowrank.open(home / "run").summary["status"] == "interrupted"
    done = run("-m", "lowrank.cli", "resume", "../home/run", "loop.max_seconds=null", cwd=home.parent / "other")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 1 " in done.stderr
    assert f"run directory {home / 'run'}" in " ".join(done.stdout.split()) or "../home/run" in done.stdout
    assert all(torch.equal(whole[name], tensor) for name, tensor in adapter(home / "run").items())
    config = lowrank.open(home / "run").config
    assert config.data.path == str(home / "rows.jsonl")
    assert (config.checkpoint.resume, config.loop.max_seconds) == (False, None)


def test_a_run_that_is_done_stays_and_can_be_made_longer(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go(home / "run")
    monkeypatch.chdir(home.parent / "other")
    before = (home / "run/summary.json").read_bytes()
    assert resume("../home/run") == 0
    captured = capsys.readouterr()
    assert "this run is done; nothing to resume." in captured.err
    assert "held-out evaluation" in captured.out
    assert (home / "run/summary.json").read_bytes() == before
    assert resume(home / "run", "loop.steps=5") == 0
    assert lowrank.open(home / "run").summary["steps"] == 5


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["optim.lr=1e-2"], 6, "resume refused: optim.lr 0.0005 → 0.01. To accept: 'checkpoint.allow=[optim.lr]'."),
        (["optim.lrr=1"], 2, "optim.lrr: unknown key. Did you mean 'lr'? Allowed: lr, weight_decay,"),
        (["optm.lr=1"], 2, "optm: unknown key. Did you mean 'optim'? Allowed: model, quant,"),
        (["adapter.r=0"], 2, "adapter.r: 0 is not allowed; a positive integer."),
        (["optim.lr"], 2, "optim.lr: not a valid override"),
        (["optim.lr=1,2"], 2, "optim.lr: 'optim.lr=1,2' is several values; one is needed."),
        (["~optim.momentum"], 2, "optim.momentum: unknown key; nothing to delete."),
        (["optim=sdg"], 2, "optim: 'sdg' is not a choice. Did you mean 'sgd'?"),
        (["checkpoint.allow=[optim.l]"], 2, "checkpoint.allow: 'optim.l' is nothing that a run's numbers depend on."),
        (["data.path=none.jsonl"], 4, "data.path: no file 'none.jsonl'."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_block_with_train_pys_exit_code(
    home: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], code: int, said: str
) -> None:
    if not (home.parent / "run").exists():
        go(home.parent / "run", *STOP)
    capsys.readouterr()
    assert resume(home.parent / "run", *overrides) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(said)


def test_values_are_read_as_train_py_reads_them(home: Path) -> None:
    go(home / "run", *STOP, "adapter.targets={q_proj:{r:2},v_proj:null}")
    wanted = ("checkpoint.allow=[optim,adapter]", "optim=sgd", "optim.lr=0.1", "++optim.dampening=0.5", "eval.limit=1")
    assert resume(home / "run", *wanted, "loop.max_seconds=null", "adapter.targets={q_proj:{r:2},v_proj:{}}") == 0
    config = lowrank.open(home / "run").config
    assert (config.optim.target, config.optim.lr, config.optim.options["dampening"]) == ("torch.optim.SGD", 0.1, 0.5)
    assert config.adapter.targets == {"q_proj": {"r": 2}, "v_proj": {}}
    assert config.checkpoint.allow == []
    assert (config.loop.steps, config.data.path) == (4, "rows.jsonl")  # what was not changed is the run's


def test_what_was_allowed_once_is_refused_the_next_time(home: Path) -> None:
    go(home / "run", *STOP)
    assert resume(home / "run", "optim.lr=1e-3", "checkpoint.allow=[optim.lr]") == 0
    assert resume(home / "run", "optim.lr=1e-2") == 6


def test_a_folder_that_is_no_run_is_said_to_be_none(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(home / "nothing") == 2
    assert capsys.readouterr().err == f"{home / 'nothing'}: not a run directory (no config.yaml there).\n"
    assert not (home / "nothing").exists()


# A class of the user's own


@pytest.fixture
def own(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stopped run of a class whose folder is no longer on the import path."""
    sys.modules.pop("own_of_resume", None)
    (home / "own").mkdir()
    (home / "own" / "own_of_resume.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home / "own"))
        go(home / "run", *STOP, "adapter._target_=own_of_resume.Own")
    monkeypatch.chdir(home.parent / "other")
    sys.modules.pop("own_of_resume")
    return home / "run"


def test_an_own_class_is_found_where_this_user_has_trained_with_it(own: Path) -> None:
    assert resume(own, "loop.max_seconds=null") == 0
    assert lowrank.open(own).summary["status"] == "done"


def test_a_run_directorys_word_alone_is_no_reason_to_import(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(os.environ["LOWRANK_CACHE"]) / source.FOLDERS).unlink()
    (own.parent / "own" / "own_of_resume.py").write_text("raise SystemExit('run by somebody else's word')")
    capsys.readouterr()
    assert resume(own) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "adapter._target_: 'own_of_resume.Own' cannot be imported; no module 'own_of_resume'."
    folder = own.parent / "own"
    assert second == (f"The run found it in {folder}. If that is yours: PYTHONPATH={folder} lowrank resume {own}")


def test_an_own_class_beside_the_user_is_found(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(os.environ["LOWRANK_CACHE"]) / source.FOLDERS).unlink()
    monkeypatch.chdir(own.parent / "own")
    assert resume(own, "loop.max_seconds=null") == 0


def test_data_that_moved_with_the_user_are_found_where_they_are_now(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(home / "run", *STOP)
    shutil.copytree(home / "run", home.parent / "other" / "run")
    shutil.move(home / "rows.jsonl", home.parent / "other" / "rows.jsonl")
    monkeypatch.chdir(home.parent / "other")
    assert resume("run", "loop.max_seconds=null") == 0
    told = json.loads((home.parent / "other" / "run" / "identity.json").read_text())["provenance"]
    assert told["directory"] == str(home.parent / "other")
