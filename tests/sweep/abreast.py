"""Runs in fp64, each alone or all in one pass: what must be equal in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cli import SMALL
from torch import Tensor

from lowrank import assemble
from lowrank.adapters.inject import apply, hooks, named_trainable
from lowrank.adapters.sites import adapted
from lowrank.assemble import Data, Parts
from lowrank.compose import compose
from lowrank.data.pack import pack
from lowrank.keys import Clock
from lowrank.models.twin import twin
from lowrank.sweep.joint import Joint
from lowrank.train import together
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.loop import Loop
from lowrank.train.precision import Precision


class Losses(Hook):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def after_step(self, record: StepRecord) -> None:
        self.seen.append(record.loss)


@dataclass(frozen=True)
class Run:
    loop: Loop
    steps: int
    parts: Parts
    losses: Losses

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.loop.parameters.items()}


def bases(rows: Path, *common: str) -> tuple[Any, list[str]]:
    """A tiny model in fp64, and what all of its jobs have in common."""
    shared = [*SMALL, f"data.path={rows}", "model=tiny_llama", "optim.lr=1e-2", "loop.steps=6", *common]
    return assemble.load(read(tuple(shared))[0]).model.double(), shared


@cache
def read(overrides: tuple[str, ...]) -> tuple[Parts, Data]:
    parts = assemble.parts(compose(list(overrides)))
    return parts, assemble.data(parts.config, parts.tokenizer)


def run_of(base: Any, overrides: Sequence[str]) -> Run:
    """A run's own tree, adapters, optimizer and order; nothing of it is written anywhere."""
    parts, data = read(tuple(overrides))
    config, model = parts.config, twin(base)
    clock = Clock(config.loop.seed)
    apply(model, parts.plan, config.loop.seed, clock)
    model.double()
    assemble.quickened(parts, model)
    order = assemble.batches(config, data, pack)
    steps, schedule = assemble.steps_and_schedule(config, order)
    losses = Losses()
    loop = Loop(
        model,
        named_trainable(model),
        order,
        assemble.loss(config),
        assemble.optimizer(config.optim, model),
        schedule,
        Precision("fp32", parts.device),
        clock,
        config.loop.max_grad_norm,
        [*hooks(model, steps), losses],
        penalty=lambda: sum(site.adapter.penalty() for _, site in adapted(model)),
        max_skipped=config.loop.max_skipped if config.loop.on_nonfinite == "skip" else 0,
    )
    return Run(loop, steps, parts, losses)


def alone(runs: Sequence[Run]) -> None:
    for run in runs:
        run.loop.run(run.steps)


def in_one_pass(base: Any, runs: Sequence[Run], said: list[str] | None = None) -> list[together.Left]:
    """Each as it left. Where a pass failed is ``said``, and else must not be."""
    first, lines = runs[0], [] if said is None else said
    joint = Joint(twin(base), {n: r.loop.model for n, r in enumerate(runs)}, first.parts, first.loop.precision)
    left = []
    for one in together.run([run.loop for run in runs], [run.steps for run in runs], joint, lines.append):
        joint.leave(one.number)
        left.append(one)
    assert said is not None or not lines, lines
    return left


def furthest(run: Run, other: Run) -> float:
    """Between weights and between losses, the greatest difference."""
    assert run.weights.keys() == other.weights.keys()
    apart = [float((tensor - other.weights[name]).abs().max()) for name, tensor in run.weights.items()]
    return max(*apart, *(abs(a - b) for a, b in zip(run.losses.seen, other.losses.seen, strict=True)))


def moved(run: Run, start: dict[str, Tensor]) -> float:
    return max(float((tensor - start[name]).abs().max()) for name, tensor in run.weights.items())


def poisoned(run: Run, step: int) -> None:
    """A NaN in an adapter's own weight before ``step``: its gradient and its loss are NaN in that step alone."""

    class Poison(Hook):
        def after_step(self, record: StepRecord) -> None:
            if record.step == step - 1:
                with torch.no_grad():
                    next(iter(run.loop.parameters.values())).fill_(float("nan"))

    run.loop.hooks = [*run.loop.hooks, Poison()]
