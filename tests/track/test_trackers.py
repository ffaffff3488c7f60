"""Trackers observe: what they are given arrives, and whatever happens to them the run goes on."""

from __future__ import annotations

import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowrank.errors import ConfigError
from lowrank.schema import Track
from lowrank.track import tracker
from lowrank.train.hooks import Hook, StepRecord

CONFIG = {"loop": {"steps": 3}, "adapter": {"r": 8}}


def record(step, loss=2.0):
    return StepRecord(
        step=step,
        loss=loss,
        lr=1e-4,
        grad_norm=0.5,
        target_tokens=10,
        real_tokens=100,
        tokens_per_s=50.0,
        peak_memory_mb=300.0,
        seconds=2.0,
    )


def test_none_is_no_hook(tmp_path):
    assert tracker(Track("none"), tmp_path, CONFIG) is None
    assert list(tmp_path.iterdir()) == []


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_every_step_and_evaluation(tmp_path):
    hook = tracker(Track("tensorboard"), tmp_path, CONFIG)
    assert isinstance(hook, Hook)
    hook.after_step(record(1, 3.0))
    hook.evaluated(2, {"loss": 1.5, "perplexity": 4.5})
    hook.after_step(record(2, 2.0))
    found = scalars(tmp_path)  # flushed at each step: a run that is killed loses nothing
    hook.close()
    assert found["train/loss"] == [(1, 3.0), (2, 2.0)]
    assert found["eval/perplexity"] == [(2, 4.5)]
    fields = set(record(1).to_dict()) - {"event", "step"}
    assert {tag.removeprefix("train/") for tag in found if tag.startswith("train/")} == fields


def test_a_resumed_run_takes_back_the_steps_it_repeats(tmp_path):
    for steps in (range(1, 6), range(4, 7)):  # killed at 5, resumed from a checkpoint of 3
        hook = tracker(Track("tensorboard"), tmp_path, CONFIG)
        for step in steps:
            hook.after_step(record(step, loss=float(step)))
        hook.close()
    assert scalars(tmp_path)["train/loss"] == [(step, float(step)) for step in range(1, 7)]


STAND_IN = """
import json, os
calls = []
def init(**options):
    if os.environ.get("STAND_IN") == "no login":
        raise RuntimeError("api_key not configured")
    calls.append(("init", options))
    return Run()
class Run:
    def log(self, values, step):
        if os.environ.get("STAND_IN") == "no network":
            raise ConnectionError("unreachable")
        calls.append(("log", step, values))
    def finish(self):
        calls.append(("finish",))
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


def test_wandb_gets_the_configuration_every_step_and_evaluation(tmp_path, wandb):
    folder = tmp_path / "run"
    hook = tracker(Track("wandb", project="summaries", name="first"), folder, CONFIG)
    hook.after_step(record(1))
    hook.evaluated(1, {"loss": 1.5})
    hook.close()
    (_, options), log, evaluation, finish = wandb.calls
    assert options["project"] == "summaries"
    assert options["name"] == "first"
    assert options["config"] == CONFIG
    assert options["dir"] == str(folder)
    assert "mode" not in options, "WANDB_MODE decides"
    assert log[1] == 1
    assert log[2]["train/loss"] == 2.0
    assert evaluation == ("log", 1, {"eval/loss": 1.5})
    assert finish == ("finish",)


def test_a_resumed_run_is_the_same_wandb_run_and_another_directory_is_not(tmp_path, wandb):
    for folder in ("a", "a", "b"):
        tracker(Track("wandb"), tmp_path / folder, CONFIG)
    first, second, other = (options["id"] for _, options in wandb.calls)
    assert first == second != other
    assert wandb.calls[0][1]["name"] == "a"


def test_a_tracker_that_fails_says_so_once_and_goes_on(tmp_path, wandb, monkeypatch, capsys):
    hook = tracker(Track("wandb"), tmp_path / "run", CONFIG)
    monkeypatch.setenv("STAND_IN", "no network")
    for step in (1, 2, 3):
        hook.after_step(record(step))
    hook.evaluated(3, {"loss": 1.0})
    monkeypatch.delenv("STAND_IN")
    hook.after_step(record(4))
    hook.close()
    assert capsys.readouterr().err == "track: wandb failed (ConnectionError: unreachable); the run goes on.\n"
    assert [call[:2] for call in wandb.calls[1:]] == [("log", 4), ("finish",)]


def test_a_tracker_that_cannot_start_says_so_and_is_left_out(tmp_path, wandb, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN", "no login")
    assert tracker(Track("wandb"), tmp_path / "run", CONFIG) is None
    assert "track: wandb failed (RuntimeError: api_key not configured)" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_a_configuration_error_that_says_what_to_install(kind, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"lowrank.track.{kind}", raising=False)
    with pytest.raises(ConfigError, match=rf"track\.kind: '{kind}' .*pip install 'lowrank\[{kind}\]'") as caught:
        tracker(Track(kind), tmp_path / "run", CONFIG)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_what_is_not_json_in_the_configuration_does_not_stop_a_run(tmp_path, capsys):
    hook = tracker(Track("tensorboard"), tmp_path, {"odd": object()})
    hook.after_step(record(1))
    hook.after_step(record(2))
    hook.close()
    assert capsys.readouterr().err.count("track: tensorboard failed") == 1
    assert json.dumps(scalars(tmp_path)["train/loss"]) == "[[2, 2.0]]"
