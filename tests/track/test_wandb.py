"""What wandb is told, by a stand-in where it is not installed; by wandb itself, offline, where it is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from lowrank.schema import Track
from lowrank.track import tracker

from test_trackers import CONFIG, ROWS, finish, record  # isort: skip

STAND_IN = """
import os
calls = []
class Settings(dict): pass
class Table(dict): pass
class Html(str):
    def __new__(cls, text, inject): return super().__new__(cls, text)
def Settings(**settings): return settings
def init(**options):
    if os.environ.get("STAND_IN") == "no login":
        raise RuntimeError("api_key not configured")
    calls.append(("init", options))
    return Run()
class Run:
    def log(self, values, step): calls.append(("log", step, values))
    def finish(self): calls.append(("finish",))
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module called wandb, importable and as small as what is used of it."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder)
    for name in ("wandb", "lowrank.track.wandb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield __import__("wandb")
    for name in ("wandb", "lowrank.track.wandb"):
        sys.modules.pop(name, None)


def test_wandb_gets_the_configuration_every_step_and_evaluation_the_samples_and_the_report(tmp_path, wandb):
    folder = tmp_path / "run"
    hook = tracker(Track("wandb", project="summaries", name="first"), folder, CONFIG)
    hook.after_step(record(1))
    hook.evaluated(1, {"loss": 1.5})
    finish(folder)
    hook.close()
    (_, options), log, evaluation, samples, report, end = wandb.calls
    assert options["project"] == "summaries"
    assert options["name"] == "first"
    assert options["config"] == CONFIG
    assert options["dir"] == str(folder)
    assert "mode" not in options, "WANDB_MODE decides"
    assert log[1] == 1
    assert log[2]["train/loss"] == 2.0
    assert evaluation == ("log", 1, {"eval/loss": 1.5})
    assert samples[2]["samples"]["columns"] == ["row", "prompt", "base", "tuned"]
    assert samples[2]["samples"]["data"][1] == [4, "Say 4.", None, "4"]
    assert report == ("log", 1, {"report": "<p>héllo</p>"})
    assert end == ("finish",)


def test_a_resumed_run_is_the_same_wandb_run_and_another_directory_is_not(tmp_path, wandb):
    for folder in ("a", "a", "b"):
        tracker(Track("wandb"), tmp_path / folder, CONFIG).close()
    first, second, other = (call[1]["id"] for call in wandb.calls if call[0] == "init")
    assert first == second != other
    assert wandb.calls[0][1]["name"] == "a"


def test_without_a_login_the_run_goes_on(tmp_path, wandb, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN", "no login")
    assert tracker(Track("wandb"), tmp_path / "run", CONFIG) is None
    assert "track: wandb failed (RuntimeError: api_key not configured)" in capsys.readouterr().err


OFFLINE = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_trackers import *
folder = Path(sys.argv[1])
for steps in (range(1, 4), range(3, 6)):
    hook = tracker(Track("wandb"), folder, CONFIG)
    for step in steps:
        hook.after_step(record(step))
    hook.evaluated(step, {{"loss": 1.5}})
    finish(folder)
    hook.close()
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is an optional extra")
def test_wandb_itself_keeps_a_run_offline_and_is_told_no_secret(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    script = OFFLINE.format(path=[os.path.dirname(__file__), *sys.path])
    secret = "plantedsecret"
    environment = {**os.environ, "WANDB_MODE": "offline", "SOME_API_TOKEN": secret, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", script, str(folder), f"loop.token={secret}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    parts = list((folder / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert len({part.name.rpartition("-")[2] for part in parts}) == 1, "one run, resumed"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(b"train/loss" in path.read_bytes() for path in files)
    assert any(path.suffix == ".html" and "héllo" in path.read_text() for path in files if "report" in path.name)
    assert any(ROWS[1]["prompt"].encode() in path.read_bytes() for path in files if path.suffix == ".json")
    assert not any(secret.encode() in path.read_bytes() for path in files)
