"""Signals at every stage of a run, sent by the adapter from inside it: what is left resumes to the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import ROOT, SMALL, environment, train, write_rows
from torch import Tensor

import lowrank
from lowrank.adapters import store
from lowrank.errors import Interrupted

# Sends what AT names at its n-th call in training or in evaluation; each micro-batch and each held-out batch is one.
# The calls by which a run's memory is predicted hold no values, and do not count.
SENDER = """
import os, signal
from lowrank.adapters import LoRA
from torch._subclasses.fake_tensor import FakeTensor
AT = os.environ.get("SEND_AT", "")
CALLS = {"train": 0, "eval": 0}

class Sender(LoRA):
    def forward(self, base, x):
        mode = "train" if self.training else "eval"
        CALLS[mode] += not isinstance(x, FakeTensor)
        for one in AT.split() if not isinstance(x, FakeTensor) else ():
            if one == f"{mode}:{CALLS[mode]}":
                os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(base, x)
"""
RUN = (
    *("model=tiny_gpt2", "adapter._target_=sender.Sender", "adapter.targets=[c_attn@0]", "loop.steps=6"),
    *("loop.accumulate=2", "adapter.dropout=0.1", "eval.every=2", "checkpoint.every=4", "eval.before=false"),
)
UNTIMED = ("event", "step", "loss", "perplexity", "lr", "grad_norm", "real_tokens", "target_tokens", "spike")


@pytest.fixture(scope="module")
def sender(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("sender")
    (folder / "sender.py").write_text(SENDER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("LOWRANK_CACHE", str(folder / "cache"))
        import sender  # type: ignore[import-not-found]

        yield sender
        del sys.modules["sender"]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rows = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")
    return [*SMALL, *RUN, f"data.path={rows}"]


@pytest.fixture(scope="module")
def trained(sender: Any, overrides: list[str]) -> Callable[..., Any]:
    def train(folder: Path, *more: str, at: str = "") -> Any:
        sender.AT = at
        sender.CALLS.update(train=0, eval=0)
        return lowrank.train([*overrides, *more], folder)

    return train


@pytest.fixture(scope="module")
def whole(trained: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(tmp_path_factory.mktemp("whole") / "run")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{k: row[k] for k in UNTIMED if k in row} for row in lowrank.open(folder).metrics]


def adapter(folder: Path) -> dict[str, Tensor]:
    return store.read(folder / "adapter")[1]


def same_run(one: Path, other: Path) -> bool:
    first, second = adapter(one), adapter(other)
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return same and rows_of(one) == rows_of(other)


def status(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["status"])


@pytest.mark.parametrize(
    ("at", "step"),
    [
        *(
            ("train:1", 1),
            ("train:6", 3),
            ("train:8", 4),
            ("train:10", 6),
        ),  # of two micro-batches a step, the fifth of one
        *(("eval:3", 2), ("eval:4", 4), ("eval:5", 6), ("eval:6", 6)),  # after two calls of the pre-flight
    ],
    ids=["first", "odd", "saved", "last", "evaluated", "evaluated and saved", "evaluated last", "generating"],
)
def test_a_signal_in_training_or_evaluation_saves_the_step_and_the_resume_is_exact(
    at: str, step: int, trained: Callable[..., Any], whole: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"^interrupted after step {step} of 6; checkpoint.resume=true continues it"):
        trained(folder, at=at)
    assert status(folder) == "interrupted"
    assert not (folder / "adapter").exists()
    assert (folder / "checkpoints" / f"step-{step:08d}").is_dir()
    resumed = trained(folder, "checkpoint.resume=true")
    assert status(folder) == "done"
    assert same_run(resumed.folder, whole.folder)


def test_a_signal_before_the_first_step_leaves_nothing(trained: Callable[..., Any], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", at="eval:1")
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_without_checkpoints_an_interruption_says_that_nothing_was_saved(
    trained: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted, match=r"after step 3 of 6; checkpoint\.every=0: nothing was saved\.$"):
        trained(tmp_path / "run", "checkpoint.every=0", at="train:6")
    assert not list(tmp_path.rglob("step-*"))


def test_a_budget_of_seconds_ends_with_what_a_resume_goes_on_from(
    trained: Callable[..., Any], whole: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    for step in (1, 2):
        stopped = trained(folder, "loop.max_seconds=1e-6", *(["checkpoint.resume=true"] if step > 1 else []))
        assert (stopped.summary["status"], stopped.summary["steps"]) == ("interrupted", step)
        said = f"loop.max_seconds=1e-06: interrupted after step {step} of 6; checkpoint.resume=true continues it.\n"
        assert said in capfd.readouterr().err
        assert not stopped.model.training
    assert same_run(trained(folder, "checkpoint.resume=true").folder, whole.folder)


def test_a_spent_budget_exits_0_with_the_runs_figures(overrides: list[str], sender: Any, tmp_path: Path) -> None:
    more = ("loop.max_seconds=1e-6", f"hydra.run.dir={tmp_path / 'run'}")
    done = train(*overrides, *more, PYTHONPATH=str(Path(sender.__file__).parent))
    assert done.returncode == 0, done.stderr
    assert "speed" in done.stdout
    assert "held-out" not in done.stdout


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_stays(
    overrides: list[str], sender: Any, trained: Callable[..., Any], whole: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    home = str(Path(sender.__file__).parent)
    more = ("checkpoint.every=1", f"hydra.run.dir={folder}")
    done = train(*overrides, *more, PYTHONPATH=home, SEND_AT="train:5 train:6")
    assert done.returncode == -signal.SIGTERM
    assert done.stderr.endswith("stopping after this step; once more ends at once\n")
    assert (folder / "checkpoints" / "step-00000002").is_dir()
    assert same_run(trained(folder, "checkpoint.resume=true").folder, whole.folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_modules_import_is_one_line_130_and_no_folder(
    number: signal.Signals, overrides: list[str], sender: Any, tmp_path: Path
) -> None:
    home = str(Path(sender.__file__).parent)
    command = [sys.executable, str(ROOT / "train.py"), *overrides, f"hydra.run.dir={tmp_path / 'run'}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment(PYTHONPATH=home), **pipes)
    until = time.monotonic() + 60
    while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(number)
    said = process.communicate(timeout=60)
    assert (process.returncode, *said) == (130, "", "interrupted.\n")
    assert not (tmp_path / "run").exists()
