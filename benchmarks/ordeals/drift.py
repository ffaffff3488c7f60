"""What a run depends on changed before it goes on: refused, naming what it is, and nothing on the disk is changed."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.ordeals import changes, forks, peer_drift
from benchmarks.ordeals.arm import Row, differing, spaced
from benchmarks.ordeals.changes import Change
from benchmarks.ordeals.ground import Ground
from benchmarks.ordeals.ours import Ours

LOGS = ("events.log", ".lock")
OWN = '''"""A method of the user's own."""

from lowrank.adapters import LoRA


class Own(LoRA):
    FACTOR = 1.0
'''
OVERRIDES = (
    *("optim.lr=2e-2", "optim.weight_decay=0.1", "optim.betas=[0.8,0.99]", "optim.eps=1e-6"),
    *("schedule.kind=cosine", "schedule.warmup=3", "loop.micro_batch=3", "loop.accumulate=2", "loop.seed=1"),
    *("loop.max_grad_norm=1.0", "loop.precision=bf16", "loop.average=0.9", "loop.steps=7"),
    *("adapter.r=4", "adapter.alpha=8", "adapter.dropout=0.0", "adapter.targets=[k_proj]", "adapter.rslora=true"),
    *("data.max_length=75", "data.template=chat", "data.train_on=all", "data.eval_fraction=0.2", "data.seed=1"),
    "quant.kind=nf4",
)


@dataclass(frozen=True)
class Drift:
    """``named`` is what a refusal must name: an override, or what is changed outside of the configuration."""

    named: str
    override: str = ""
    change: Change = changes.nothing

    def __str__(self) -> str:
        return self.override or changes.NAMES[self.change]


def drifts() -> list[Drift]:
    outside = [
        *(("data", change) for change in (changes.a_character_of_the_data, changes.two_rows_swapped)),
        *(("base", changes.a_bit_of_the_base), ("tokenizer", changes.two_tokens_swapped)),
        *(("code", changes.the_users_own_code), ("threads", changes.two_threads)),
        ("versions.transformers", changes.another_version),
    ]
    inside = [Drift(override.partition("=")[0], override) for override in OVERRIDES]
    return [*inside, *(Drift(named, change=change) for named, change in outside)]


def rows(ground: Ground, most: int | None = None) -> Iterator[Row]:
    made_from = prepared(ground)
    first = Importing(of(ground.ours, made_from), made_from)
    stopped = ground.stopped(first, "drifting")
    ground.goes_on(first, stopped)
    wanted = spaced(drifts(), most)
    ours = ground.judged(wanted, partial(judge, ground, stopped, made_from))
    peer = peer_drift.figure(ground, made_from, most) if ground.peer is not None else None
    yield Row("what a run depends on changed: the resume is refused, naming it", ours, peer)


def prepared(ground: Ground) -> Path:
    """The folder of all that runs are made from, so that any of it can be changed: data, a base, a user's code."""
    folder = ground.folder / "made-from"
    (folder / "own").mkdir(parents=True)
    (folder / "own" / "own_method.py").write_text(OWN, encoding="utf-8")
    shutil.copyfile(ground.ours.data, folder / "data.jsonl")
    shutil.copytree(ground.base, folder / "base")
    return folder


def of(ours: Ours, made_from: Path) -> Ours:
    own = ("adapter._target_=own_method.Own", "model=hf", f"model.name={made_from / 'base'}", "model.dtype=fp32")
    return replace(ours, data=made_from / "data.jsonl", overrides=own)


def judge(ground: Ground, stopped: Path, made_from: Path, drift: Drift) -> str:
    """Each goes on in a copy of the same run, with a copy of what that was made from."""
    where = f"drift {drift}"
    folder, copy = ground.copy(stopped, where), ground.copy(made_from, f"{where} made from")
    before = tree(folder)

    def act() -> None:
        drift.change(copy)
        Importing(of(ground.ours, copy).having(*([drift.override] if drift.override else [])), copy).again(folder)

    ended = forks.child(act)
    changed = differing(before, tree(folder))
    fault = f"{', '.join(changed)} changed on the disk" if changed else ""
    if ended.code != 6 or f"{drift.named} " not in ended.output or "Traceback" in ended.output:
        fault = f"exit code {ended.code}: {ended.last}; {fault}"
    for path in (folder, copy):
        shutil.rmtree(path)
    return fault


@dataclass(frozen=True)
class Importing:
    """lowrank's run where the user's own code is on the import path."""

    ours: Ours
    made_from: Path

    name, places = Ours.name, Ours.places

    def program(self, folder: Path) -> None:
        sys.path.insert(0, str(self.made_from / "own"))
        self.ours.program(folder)

    def again(self, folder: Path) -> None:
        sys.path.insert(0, str(self.made_from / "own"))
        self.ours.again(folder)

    def keeping(self) -> Importing:
        return replace(self, ours=self.ours.keeping())


def tree(folder: Path) -> dict[str, str]:
    """The hash of every file but logs."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in LOGS]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
