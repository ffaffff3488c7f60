"""Trackers observe: what they are given arrives, and whatever happens to them the run goes on."""

from __future__ import annotations

import json
import sys
import threading
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowrank.errors import ConfigError
from lowrank.schema import Track
from lowrank.track import Tracker, Tracking, tracker
from lowrank.train.hooks import Hook, StepRecord

CONFIG = {"loop": {"steps": 3}, "adapter": {"r": 8}}
ROWS = [{"row": 1, "prompt": "Say 1.", "base": "?", "tuned": "1"}, {"row": 4, "prompt": "Say 4.", "tuned": "4"}]


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


def finish(folder):
    """What a run leaves behind before its tracker is closed."""
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "report.html").write_text("<p>héllo</p>")


def test_none_is_no_hook(tmp_path):
    assert tracker(Track("none"), tmp_path, CONFIG) is None
    assert list(tmp_path.iterdir()) == []


def events(folder):
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    return found


def scalars(folder):
    found = events(folder)
    return {tag: [(e.step, round(e.value, 5)) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def texts(folder):
    found = events(folder)
    return {
        tag.removesuffix("/text_summary"): found.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in found.Tags()["tensors"]
    }


def test_tensorboard_holds_every_step_and_evaluation_before_the_run_ends(tmp_path):
    hook = tracker(Track("tensorboard"), tmp_path, CONFIG)
    assert isinstance(hook, Hook)
    hook.after_step(record(1, 3.0))
    hook.evaluated(2, {"loss": 1.5, "perplexity": 4.5, "bleu_signature": "no number"})
    hook.after_step(record(2, 2.0))
    until = time.monotonic() + 20
    while time.monotonic() < until and not (tmp_path / "tensorboard").is_dir():
        time.sleep(0.05)
    while time.monotonic() < until and len(scalars(tmp_path).get("train/loss", ())) < 2:
        time.sleep(0.05)
    found = scalars(tmp_path)  # flushed at each step: a run that is killed loses nothing
    hook.close()
    assert found["train/loss"] == [(1, 3.0), (2, 2.0)]
    assert found["eval/perplexity"] == [(2, 4.5)]
    fields = set(record(1).to_dict()) - {"event", "step"}
    assert {tag.removeprefix("train/") for tag in found if tag.startswith("train/")} == fields
    assert "eval/bleu_signature" not in found


def test_tensorboard_has_the_configuration_the_samples_and_where_the_report_is(tmp_path):
    hook = tracker(Track("tensorboard"), tmp_path, CONFIG)
    hook.after_step(record(1))
    finish(tmp_path)
    hook.close()
    found = texts(tmp_path)
    assert '"r": 8' in found["config"]
    assert "Say 4." in found["samples/1"]
    assert str(tmp_path / "report.html") in found["report.html"]


def test_a_resumed_run_takes_back_the_steps_it_repeats(tmp_path):
    for steps in (range(1, 6), range(4, 7)):  # killed at 5, resumed from a checkpoint of 3
        hook = tracker(Track("tensorboard"), tmp_path, CONFIG)
        for step in steps:
            hook.after_step(record(step, loss=float(step)))
        hook.close()
    assert scalars(tmp_path)["train/loss"] == [(step, float(step)) for step in range(1, 7)]


@pytest.mark.parametrize(("kind", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_a_configuration_error_that_says_what_to_install(kind, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"lowrank.track.{kind}", raising=False)
    with pytest.raises(ConfigError, match=rf"track\.kind: '{kind}' .*pip install 'lowrank\[{kind}\]'") as caught:
        tracker(Track(kind), tmp_path / "run", CONFIG)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


class Kept(Tracker):
    """A user's own; ``fails`` are the methods that raise."""

    fails: tuple[str, ...] = ()
    calls: list

    def __init__(self, track, folder, config):
        self.calls = []
        self.take("init", track.name, folder, config)

    def take(self, what, *told):
        if what in self.fails:
            raise ConnectionError(f"{what}: unreachable")
        self.calls.append((what, *told))

    def log(self, step, values):
        self.take("log", step, values)

    def samples(self, step, rows):
        self.take("samples", step, rows)

    def attach(self, step, path):
        self.take("attach", step, path.name)

    def close(self):
        self.take("close")


OWN = Track("own", name="first", target=f"{__name__}.Kept")


def whole_run(folder, track=OWN):
    hook = tracker(track, folder, CONFIG)
    if hook is not None:
        for step in (1, 2):
            hook.after_step(record(step))
        hook.evaluated(2, {"loss": 1.5})
        finish(folder)
        hook.close()
    return hook


def test_a_tracker_of_the_users_own_gets_everything_in_order(tmp_path):
    calls = whole_run(tmp_path).tracker.calls
    assert calls[0] == ("init", "first", tmp_path, CONFIG)
    assert calls[1][2]["train/loss"] == 2.0
    assert [call[:2] for call in calls[1:3]] == [("log", 1), ("log", 2)]
    rest = [("log", 2, {"eval/loss": 1.5}), ("samples", 2, ROWS), ("attach", 2, "report.html"), ("close",)]
    assert calls[3:] == rest


@pytest.mark.parametrize("method", ["log", "samples", "attach", "close"])
def test_a_tracker_that_fails_says_so_once_and_gets_the_rest_all_the_same(method, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Kept, "fails", (method,))
    calls = whole_run(tmp_path).tracker.calls
    said = f"track: {OWN.target} failed (ConnectionError: {method}: unreachable); the run goes on.\n"
    assert capsys.readouterr().err == said
    others = {"init", "log", "samples", "attach", "close"} - {method}
    assert {call[0] for call in calls} == others


@pytest.mark.parametrize("error", [RuntimeError("not logged in"), SystemExit(1)])
def test_a_tracker_that_cannot_start_says_so_and_is_left_out(error, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise error

    monkeypatch.setattr(Kept, "take", refuse)
    assert whole_run(tmp_path) is None
    assert f"track: {OWN.target} failed ({type(error).__name__}: {error})" in capsys.readouterr().err


def test_a_tracker_that_hangs_holds_no_step_up_and_is_left_behind_at_the_end(tmp_path, capsys):
    never = threading.Event()

    class Hangs(Tracker):
        def log(self, step, values):
            never.wait()

    hook = Tracking("slow", Hangs(Track("own"), tmp_path, CONFIG), tmp_path, patience=0.2)
    began = time.monotonic()
    for step in range(20_000):
        hook.after_step(record(step))
    hook.close()
    assert time.monotonic() - began < 20
    assert capsys.readouterr().err == "track: slow failed (TimeoutError: 10,000 calls behind); the run goes on.\n"
    never.set()


def test_neither_the_configuration_nor_a_complaint_tells_a_secret(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOME_API_TOKEN", "plantedsecret")
    hook = tracker(Track("own", name="of plantedsecret", target=OWN.target), tmp_path, {"a": "plantedsecret"})

    def refuse(step, values):
        raise ConnectionError("401 for plantedsecret")

    hook.tracker.log = refuse
    hook.after_step(record(1))
    hook.close()
    assert hook.tracker.calls[0] == ("init", "of ***", tmp_path, {"a": "***"})
    assert "401 for ***" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (None, r"a dotted path"),
        ("json.JSONDecoder", r"a subclass of lowrank\.track\.Tracker"),
        ("json.Nothing", r"json has no 'Nothing'"),
    ],
)
def test_a_class_that_is_no_tracker_is_refused_before_anything_begins(target, said):
    from lowrank import compose

    with pytest.raises(ConfigError, match=rf"track\._target_: .*{said}"):
        compose.compose(["track=own", f"track._target_={target or 'null'}"])


def test_a_target_belongs_to_a_tracker_of_ones_own(tmp_path):
    from lowrank import compose

    assert compose.compose(["track=own", f"track._target_={OWN.target}"]).track.target == OWN.target
    with pytest.raises(ConfigError, match=r"track\._target_: only with track=own"):
        compose.compose(["track=none", "track._target_=json.JSONDecoder"])
    with pytest.raises(ConfigError, match=r"track\._target_: missing; the dotted path"):
        compose.compose(["track=own"])
