"""Secrets in the environment, in the configuration and on the command line of a run that ends well or badly: nothing
that it leaves, and nothing that it prints, has them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from cli import SMALL, train, write_rows

from lowrank.config import load

ENVIRONMENT = {
    "HF_TOKEN": "hf_PlantedInTheEnvironment",
    "WANDB_API_KEY": "feedfacefeedfacefeedfacefeedfacefeedface",
    "DB_PASSWORD": 'it\'s "planted" & kept',
    "AWS_SECRET_ACCESS_KEY": "Planted/Key+In=Base64",
}
TYPED = "hf_PlantedOnTheCommandLine1"  # of no variable
BUGGY = """
from lowrank.adapters import LoRA
class Buggy(LoRA):
    calls = 0
    def penalty(self):
        import os
        Buggy.calls += 1
        if Buggy.calls > 2:
            raise RuntimeError("cannot log in with " + os.environ["HF_TOKEN"] + " or https://me:myplantedpass@host")
        return 0.0
"""
RUN = (
    *SMALL,
    "model=tiny_llama",
    "loop.steps=2",
    "checkpoint.every=1",
    "eval.before=false",
    "adapter.targets=[q_proj]",
)


def leaks(folder: Path, done: subprocess.CompletedProcess[str], *more: str) -> list[str]:
    """Where a secret is found, whole or a line of it as JSON has it."""
    planted = [*ENVIRONMENT.values(), TYPED, *more]
    planted += [json.dumps(secret)[1:-1] for secret in planted]
    texts = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    texts |= {f"the name {path}": str(path).encode() for path in folder.rglob("*")}
    return [where for where, text in texts.items() for secret in planted if secret.encode() in text]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = write_rows(tmp_path / "rows.jsonl")
    secret = {"instruction": "Say the key.", "input": "", "output": f"it is {ENVIRONMENT['HF_TOKEN']}"}
    path.write_text(path.read_text() + f"{json.dumps(secret)}\n" * 4)
    return path


def test_a_run_that_resolves_secrets_leaves_none_and_can_be_opened(rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = train(
        *RUN,
        f"data.path={rows}",
        f"hydra.run.dir={folder}",
        *("track=tensorboard", "track.project='${oc.env:HF_TOKEN} and ${oc.env:DB_PASSWORD}'", f"track.name={TYPED}"),
        **ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert leaks(folder, done) == []
    config = load(folder / "config.yaml")
    assert (config.track.project, config.track.name) == ("*** and ***", "***")
    assert "track.name=***" in json.loads((folder / "summary.json").read_text())["command"]
    again = train(*RUN, f"data.path={rows}", f"hydra.run.dir={folder}", "checkpoint.resume=true", **ENVIRONMENT)
    assert again.returncode == 0, again.stderr


def test_a_crash_in_a_run_tells_none(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "buggy.py").write_text(BUGGY)
    folder = tmp_path / "run"
    done = train(
        *RUN,
        *("adapter._target_=buggy.Buggy", f"data.path={rows}", f"hydra.run.dir={folder}"),
        PYTHONPATH=str(tmp_path),
        **ENVIRONMENT,
    )
    assert done.returncode == 1
    assert "RuntimeError: cannot log in with *** or https://***@host" in done.stderr
    assert "cannot log in with *** or" in (folder / "events.log").read_text()
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert leaks(folder, done, "myplantedpass") == []


@pytest.mark.parametrize("override", ["loop.precision=${oc.env:HF_TOKEN}", f"+optim.{TYPED}=1"])
def test_a_refusal_and_its_traceback_tell_none(override: str, rows: Path, tmp_path: Path) -> None:
    places = (f"data.path={rows}", f"hydra.run.dir={tmp_path}/run")
    done = train(*RUN, *places, override, LOWRANK_DEBUG="1", **ENVIRONMENT)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "***" in done.stderr
    assert leaks(tmp_path / "run", done) == []


def test_a_sweep_tells_none_in_its_folders_names_or_hydra_s_file(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    missing = f"data.path={tmp_path}/missing.jsonl"  # each job ends soon
    done = train(
        "-m", *RUN, missing, f"hydra.sweep.dir={sweep}", "track=tensorboard", f"track.name={TYPED},plain", **ENVIRONMENT
    )
    assert done.returncode == 1
    assert "track.name=***" in done.stdout
    assert "***" in (sweep / "multirun.yaml").read_text()
    assert leaks(sweep, done) == []
