"""What a run's step takes on this machine, put together from steps of thin models.

A step of L equal blocks takes t = a + L·b + c: b a block's time, a that of all else (embedding, head and loss,
optimizer, Python), c what a batch of a new shape costs once (kernels that are made for it). a and b come from models of
one block and of a few (thin.py), alternated, so that a machine that slows down slows both. Blocks that differ (some
without adapters, some below the lowest trained one) have a b each. All make one and the same step, of the run's own
first ones that nearest to their mean in tokens: t is close to a line in these.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lowrank import assemble
from lowrank.adapters.inject import hooks, named_trainable
from lowrank.adapters.sites import adapted
from lowrank.assemble import Data, Parts
from lowrank.data.chat import Example
from lowrank.data.order import Batches
from lowrank.data.pack import Batch
from lowrank.keys import Clock
from lowrank.ledger.thin import kinds, thin
from lowrank.models import load as models
from lowrank.train.loop import Loop
from lowrank.train.precision import Precision

MORE = 3  # blocks that the second model of a kind has more than the first
MICRO_BATCHES = 4  # of a step, at most: more of them take longer and tell no more
STEPS = 64  # among which the mean one is sought


@dataclass
class Steps:
    """One step, whichever the loop asks for; ``order`` are the run's own."""

    order: Batches
    now: list[Batch]

    def at(self, step: int) -> list[Batch]:
        return self.now


def rounds(
    parts: Parts, data: Data | None, cost: Callable[[Loop, list[Batch]], float] | None = None
) -> Iterator[float]:
    """Expected seconds a real token of the run's training (or what else ``cost`` tells of a step), one of each round,
    endlessly."""
    of = cost or seconds
    skeleton = assemble.skeleton(parts.config)
    groups = kinds(parts.plan, skeleton)
    few, several = sorted(group[0] for group in groups), [group for group in groups if len(group) > 1]
    base = loop_of(parts, data, skeleton, few)
    larger = [loop_of(parts, data, skeleton, sorted([*few, *group[1 : 1 + MORE]])) for group in several]
    times = [(len(group) - 1) / len(group[1 : 1 + MORE]) for group in several]  # what a larger one has more of
    steps: Any = base.batches
    mean = steps.at(0)
    tokens = sum(batch.real_tokens for batch in mean)
    for loop in (base, *larger):
        of(loop, mean)  # a shape's first step costs more
    for number in range(1, 10**9):
        fresh = steps.order.at(number)
        new = of(base, fresh) - of(base, fresh)
        one = of(base, mean)
        total = new + one + sum(n * (of(loop, mean) - one) for n, loop in zip(times, larger, strict=True))
        yield total / tokens


def seconds(loop: Loop, batches: list[Batch]) -> float:
    """Of one optimizer step."""
    synchronize(loop.device)
    begun = time.perf_counter()
    while not made(loop, batches):  # the loss scale overflowed
        begun = time.perf_counter()
    synchronize(loop.device)
    return time.perf_counter() - begun


def made(loop: Loop, batches: list[Batch]) -> bool:
    """Makes one step with these batches, whichever the loop stands at; whether it came to be."""
    steps: Any = loop.batches
    steps.now = batches
    return loop.step() is not None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loop_of(parts: Parts, data: Data | None, skeleton: nn.Module, kept: Sequence[int]) -> Loop:
    """The run's loop over a model of the blocks ``kept``, standing at the mean step."""
    config, clock = parts.config, Clock(parts.config.loop.seed)
    loaded = thin(parts, skeleton, kept, clock)
    model = loaded.model
    short = replace(config, loop=replace(config.loop, accumulate=min(config.loop.accumulate, MICRO_BATCHES)))
    order = assemble.batches(short, data or without_data(parts), loaded.collate)
    return Loop(
        model=model,
        parameters=named_trainable(model),
        batches=Steps(order, order.at(mean_step(order))),
        loss=assemble.loss(config),
        # its groups go by names that are other ones here, and cost nothing
        optimizer=assemble.optimizer(replace(config.optim, groups=[]), model, fast=config.loop.fast),
        schedule=lambda step: 1.0,
        precision=Precision(parts.precision, parts.device),
        clock=clock,
        max_norm=config.loop.max_grad_norm,
        hooks=hooks(model, assemble.steps_and_schedule(config, order)[0]),
        penalty=lambda: sum(module.adapter.penalty() for _, module in adapted(model)),
        device=parts.device,
        updating=partial(assemble.updating, config, say=lambda line: None),
    )


def mean_step(order: Batches) -> int:
    """Of the first steps the one whose tokens are nearest to their mean; a short one, an epoch's last, is left out."""
    steps = {step: order.indices(step) for step in range(1, STEPS + 1)}
    sizes = {s: sum(len(order.documents[i].tokens) for i in itertools.chain(*micro)) for s, micro in steps.items()}
    whole = {s: size for s, size in sizes.items() if len(steps[s]) == len(steps[1])}
    wanted = statistics.mean(whole.values())
    return min(whole, key=lambda s: abs(whole[s] - wanted))


def without_data(parts: Parts) -> Data:
    """Documents of ``data.max_length`` random tokens, all of them learnt, enough for one step."""
    config = parts.config
    positions = getattr(models.config(config.model).get_text_config(), "max_position_embeddings", None)
    length = min(config.data.max_length, positions or config.data.max_length)
    count = (config.loop.micro_batch or max(1, (config.loop.micro_batch_tokens or 1) // length)) * MICRO_BATCHES
    ids = torch.randint(len(parts.tokenizer), (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    made = [Example(row, tuple(one), (False, *[True] * (length - 1)), "", "") for row, one in enumerate(ids)]
    return Data(None, made, made, ())  # type: ignore[arg-type]  # there is no split
