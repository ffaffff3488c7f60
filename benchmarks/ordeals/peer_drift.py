"""The same changes for the Trainer, as far as it has them: it passes where it refuses to go on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ordeals import changes, forks
from benchmarks.ordeals.arm import Figure, spaced
from benchmarks.ordeals.changes import Change
from benchmarks.ordeals.ground import Ground

ARGUMENTS: tuple[dict[str, Any], ...] = (
    *({"learning_rate": 2e-2}, {"weight_decay": 0.1}, {"adam_beta1": 0.8}, {"adam_epsilon": 1e-6}),
    *({"lr_scheduler_type": "cosine"}, {"warmup_steps": 3}, {"per_device_train_batch_size": 3}),
    *({"gradient_accumulation_steps": 2}, {"seed": 1}, {"max_grad_norm": 1.0}, {"bf16": True}, {"max_steps": 7}),
    {"optim": "sgd"},
)
LORA: tuple[dict[str, Any], ...] = (
    *({"r": 4}, {"lora_alpha": 8}, {"lora_dropout": 0.0}, {"target_modules": ["k_proj"]}, {"use_rslora": True}),
)
OUTSIDE: tuple[Change, ...] = (
    *(changes.a_character_of_the_data, changes.two_rows_swapped, changes.a_bit_of_the_base),
    *(changes.two_tokens_swapped, changes.two_threads, changes.another_version),
)
Point = tuple[str, Any]


def figure(ground: Ground, made_from: Path, most: int | None) -> Figure:
    points: list[Point] = [*(("arguments", a) for a in ARGUMENTS), *(("lora", a) for a in LORA)]
    points += [("max_length", 8), *(("outside", changes.NAMES[change]) for change in OUTSIDE)]
    stopped = ground.stopped(ground.peer)
    ground.goes_on(ground.peer, stopped)
    return ground.judged(spaced(points, most), partial(judge, ground, made_from))


def judge(ground: Ground, made_from: Path, point: Point) -> str:
    what, value = point
    where = f"peer drift {point}"
    folder, copy = ground.copy(ground.stopped(ground.peer), where), ground.copy(made_from, f"{where} made from")

    def act() -> None:
        if what == "outside":
            next(change for change in OUTSIDE if changes.NAMES[change] == value)(copy)
        peer = replace(ground.peer, model=copy / "base", data=copy / "data.jsonl")
        if what in ("arguments", "lora"):
            value_of = getattr(peer, what)
            peer = replace(peer, **{what: {**value_of, **value}})
        elif what == "max_length":
            peer = replace(peer, max_length=value)
        peer.program(folder)

    ended = forks.child(act)
    for path in (folder, copy):
        shutil.rmtree(path)
    return "" if ended.code else "goes on, exit code 0"
