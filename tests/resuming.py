"""Runs that are stopped, and that go on, beside the same runs that nothing stopped: what must be equal in the end."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli import ROOT, SMALL, environment
from safetensors.torch import load_file
from torch import Tensor, nn, uint8
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

import lowrank
from lowrank.errors import Interrupted
from lowrank.run import Run
from lowrank.train import checkpoint

# Five batches of two make an epoch of the nine rows that are trained on: seven steps go into the second one.
STEPS = 7
ROWS = 10
SHORT = (
    *SMALL,
    *("model=tiny_llama", f"loop.steps={STEPS}", "optim.lr=1e-2", "loop.max_grad_norm=1.0"),
    *("checkpoint.every=1", "checkpoint.keep=99", "eval.every=3", "eval.before=false"),
)
FP16_OVERFLOWS = ("loop.precision=fp16", "adapter.alpha=1e3", "optim.lr=1.4e-2")  # the loss scale falls again and again
TIMES = re.compile(rb'"(tokens_per_s|(predicted_)?peak_memory_mb|seconds)": [^,}]+')
PLACES = ("metrics_bytes", "metrics", "digests", "identity", "seconds")  # of bytes that hold times; what may differ
MADE_AT_THE_END = ("summary.json", "samples.jsonl", "spectra.json", "report.html")


class Crash(Exception):
    """What no part of a run expects."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    raise Crash("in the middle of a step")


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@contextmanager
def at_update(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Acts inside a step: when the optimizer has moved for the ``number``-th time in here and nothing is counted."""
    made = itertools.count(1)
    handle = register_optimizer_step_post_hook(lambda *_: act() if next(made) == number else None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def at_call(number: int, act: Callable[[], None], *, training: bool) -> Iterator[None]:
    """Acts when the whole model is called for the ``number``-th time in training; else in evaluation after a step, as
    a call before the first step is a probe, or judges the untouched base."""
    calls, updates = itertools.count(1), Counter[str]()

    def called(module: nn.Module, inputs: Any) -> None:
        whole = isinstance(module, PreTrainedModel) and hasattr(module, "lm_head")
        if whole and module.training == training and (training or updates["made"]) and next(calls) == number:
            act()

    def moved(*_: Any) -> None:
        updates["made"] += 1

    handles = [register_module_forward_pre_hook(called), register_optimizer_step_post_hook(moved)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def full_disk(folder: Path, writes: int) -> Iterator[itertools.count[int]]:
    """Of the ``writes``-th write into ``folder`` the disk takes half, and then nothing more. Yields the counter."""
    write, made = os.write, itertools.count(1)

    def limited(descriptor: int, data: bytes) -> int:
        if not os.path.realpath(f"/proc/self/fd/{descriptor}").startswith(f"{folder}/"):
            return write(descriptor, data)
        number = next(made)
        if number > writes or (number == writes and len(data) < 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return write(descriptor, memoryview(data)[: len(data) // 2] if number == writes else data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", limited)
        yield made


@contextmanager
def slow_disk(folder: Path, seconds: float) -> Iterator[None]:
    """Each write into ``folder`` takes that long."""
    write = os.write

    def slowly(descriptor: int, data: bytes) -> int:
        if os.path.realpath(f"/proc/self/fd/{descriptor}").startswith(f"{folder}/"):
            time.sleep(seconds)
        return write(descriptor, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", slowly)
        yield


def kill_while_replacing() -> None:
    """From now on this process dies when a checkpoint has stepped aside for another of its step."""
    rename = os.rename

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(source).name.startswith("step-") and Path(target).name.endswith("-old"):
            kill()

    os.rename = renamed  # type: ignore[assignment]


def stopped(folder: Path, *overrides: str, after: int, by: Callable[[], None]) -> None:
    """A run, or its continuation, that ``by`` ends inside the ``after``-th step that it makes."""
    try:
        with at_update(after, by):
            lowrank.train([*overrides], folder)
    except (Crash, Interrupted):
        return
    raise AssertionError(f"it was not stopped at update {after}")


def process(folder: Path, *overrides: str, before: str = "") -> subprocess.Popen[str]:
    """``python train.py`` in a process of its own, that runs ``before``, which may use what is here, at its start."""
    start = f"from resuming import *; {before}" if before else "pass"
    program = f"import runpy, sys; sys.argv = sys.argv[1:]; {start}; runpy.run_path(sys.argv[0], run_name='__main__')"
    tests = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", program, str(ROOT / "train.py"), *overrides, f"hydra.run.dir={folder}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(PYTHONPATH=os.pathsep.join([tests, str(ROOT), os.environ.get("PYTHONPATH", "")])),
    )


def resumed(folder: Path, *overrides: str) -> Run:
    return lowrank.train([*overrides, "checkpoint.resume=true"], folder)


def killed(whole: Path, folder: Path, *, at: int, torn: bytes = b'{"event": "st') -> Path:
    """``folder`` as a process leaves it that dies with ``at`` as its last checkpoint, two steps and a half later.

    ``whole`` is the finished run, which has a checkpoint of every step.
    """
    shutil.copytree(whole, folder)
    for path in checkpoint.committed(folder / "checkpoints"):
        if int(path.name.removeprefix("step-")) > at:
            shutil.rmtree(path)
    for name in MADE_AT_THE_END:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "adapter")
    for name in ("metrics.jsonl", "digests.jsonl"):
        if (folder / name).exists():
            lines = (folder / name).read_bytes().splitlines(keepends=True)
            written = [line for line in lines if json.loads(line)["step"] <= at + 2]
            (folder / name).write_bytes(b"".join(written) + torn)
    return folder


def ended(folder: Path) -> dict[str, Any]:
    """All that a run leaves, by name, less times: each tensor, each value of the state, each row, each file."""
    [*_, last] = checkpoint.committed(folder / "checkpoints")
    found: dict[str, Any] = leaves(json.loads((folder / "checkpoints" / "index.json").read_bytes()), "index.json: ")
    for file in sorted(last.glob("*.safetensors")):
        found |= {f"{last.name}/{file.name}: {name}": bits(held) for name, held in load_file(file).items()}
    state = json.loads((last / checkpoint.STATE).read_bytes())
    found |= {f"{last.name}/state.json: {name}": value for name, value in leaves(state).items()}
    found |= {f"adapter/{p.name}": p.read_bytes() for p in sorted((folder / "adapter").iterdir())}
    for name in ("metrics.jsonl", "digests.jsonl", "samples.jsonl"):
        if (folder / name).exists():
            rows = TIMES.sub(rb'"\1": 0', (folder / name).read_bytes()).splitlines(keepends=True)
            found |= {f"{name}:{number}": row for number, row in enumerate(rows, 1)}
    found |= {name: (folder / name).read_bytes() for name in ("spectra.json", "plan.json", "plan.txt")}
    summary = json.loads((folder / "summary.json").read_bytes())
    timed = ("seconds", "tokens_per_s", "peak_memory_mb", "predicted_peak_memory_mb", "command")
    return found | {f"summary.json: {n}": v for n, v in leaves(summary).items() if n not in timed}


def course(folder: Path) -> dict[str, Any]:
    """``ended``, less what only tells how often the run was looked at: its evaluations and its digests."""
    looked = re.compile(r"digests\.jsonl|metrics\.jsonl|index|.*state\.json: (held_out|best|pending|hooks\.early)")
    found = {name: value for name, value in ended(folder).items() if not looked.match(name)}
    rows = TIMES.sub(rb'"\1": 0', (folder / "metrics.jsonl").read_bytes()).splitlines(keepends=True)
    trained = [row for row in rows if json.loads(row)["event"] != "eval"]
    return found | {f"metrics.jsonl:{number}": row for number, row in enumerate(trained, 1)}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what is not the same in both, or not there in one."""
    missing = object()
    return [name for name in {**one, **other} if one.get(name, missing) != other.get(name, missing)]


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().reshape(-1).view(uint8).numpy().tobytes()


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted names; a list is a leaf, and so is an empty mapping."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in PLACES:
            inside = leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
            found |= inside
    return found
