"""Other ways to make a run: the same training in less memory, and then what trains otherwise, each as overrides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from lowrank import assemble
from lowrank.assemble import Data, Parts
from lowrank.data.chat import Example
from lowrank.errors import LowrankError
from lowrank.schema import Quant

EIGHT_BIT = {"betas": [0.9, 0.999], "eps": 1e-8, "min_8bit_size": 4096}  # as conf/optim/adamw8bit.yaml has it
MODES = ("off", "selective", "block")  # of recomputation, each slower than the one before it, and smaller
SHORTEST = 64  # tokens below which a text is not cut


@dataclass(frozen=True)
class Trial:
    """A configuration with what distinguishes it from the run's own."""

    parts: Parts
    data: Data | None
    overrides: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def alike(start: Trial) -> Iterator[list[Trial]]:
    """For each way to recompute, the fastest first: the step's batch in ever more micro-batches."""
    loop = start.parts.config.loop
    for mode in MODES[MODES.index(loop.gradient_checkpointing) :]:
        batches = micro_batches(loop, start.data)
        yield [with_loop(start, {**batch, "gradient_checkpointing": mode}) for batch in batches]


def otherwise(start: Trial, optimizer: bool) -> Iterator[Iterator[list[Trial]]]:
    """``alike`` of runs that compute something else, what changes least first; ``optimizer``: whether the optimizer's
    state is worth looking at."""
    dense = four_bit(start)
    for trial in (eight_bit(start) if optimizer else None, dense, dense and optimizer and eight_bit(dense)):
        if trial:
            yield alike(trial)


def micro_batches(loop: Any, data: Data | None) -> list[dict[str, Any]]:
    """The ways to cut a step's batch, the largest micro-batch first."""
    if loop.micro_batch is not None:
        whole = loop.micro_batch * loop.accumulate
        sizes = [size for size in range(whole, 0, -1) if whole % size == 0]
        return [{"micro_batch": size, "accumulate": whole // size} for size in sizes]
    longest = max((len(example.tokens) for example in data.train), default=1) if data else 1
    doubled = itertools.takewhile(lambda n: loop.accumulate % n == 0, (2**k for k in range(64)))
    larger = [{"micro_batch_tokens": loop.micro_batch_tokens * n, "accumulate": loop.accumulate // n} for n in doubled]
    tokens = loop.micro_batch_tokens
    halves = itertools.takewhile(lambda n: tokens % n == 0 and tokens // n >= longest, (2**k for k in range(1, 64)))
    smaller = [{"micro_batch_tokens": loop.micro_batch_tokens // n, "accumulate": loop.accumulate * n} for n in halves]
    return [*reversed(larger), *smaller]


def with_loop(trial: Trial, values: dict[str, Any]) -> Trial:
    loop = trial.parts.config.loop
    new = {name: value for name, value in values.items() if value != getattr(loop, name)}
    return then(trial, [f"loop.{name}={value}" for name, value in new.items()], loop=replace(loop, **new))


def then(trial: Trial, overrides: Sequence[str], changes: str = "", **groups: Any) -> Trial:
    """``trial`` with other groups of the configuration, which ``overrides`` ask for."""
    parts = replace(trial.parts, config=replace(trial.parts.config, **groups))
    more = (changes,) if changes else ()
    return replace(trial, parts=parts, overrides=(*trial.overrides, *overrides), changes=(*trial.changes, *more))


def eight_bit(start: Trial) -> Trial | None:
    """AdamW's state in 8 bits; None where it is not AdamW, or bitsandbytes is not there."""
    optim = start.parts.config.optim
    if optim.target != "torch.optim.AdamW" or find_spec("bitsandbytes") is None:
        return None
    options = {name: optim.options.get(name, value) for name, value in EIGHT_BIT.items()}
    changed = replace(optim, target="bitsandbytes.optim.AdamW8bit", options=options)
    return then(start, ["optim=adamw8bit"], "8-bit optimizer state", optim=changed)


def four_bit(start: Trial) -> Trial | None:
    """An NF4 base; None where it is one already or cannot be."""
    if start.parts.config.quant.kind != "none" or find_spec("bitsandbytes") is None:
        return None
    made = then(start, ["quant=nf4"], "a 4-bit base", quant=Quant("nf4"))
    try:
        return replace(made, parts=assemble.parts(made.parts.config))
    except LowrankError:  # a method that trains the base's own weights
        return None


def shorter(start: Trial) -> list[Trial]:
    """Texts cut at halves of the longest one's length, the longest first."""
    data, settings = start.data, start.parts.config.data
    longest = max(len(one.tokens) for one in (*data.train, *data.eval)) if data else settings.max_length
    found = []
    while (longest := longest // 2) >= SHORTEST:
        cut, overrides = cut_at(data, longest) if data else None, [f"data.max_length={longest}"]
        if data and cut and (len(cut.train), len(cut.eval)) != (len(data.train), len(data.eval)):
            if not cut.train or not cut.eval:
                break
            overrides.append("data.on_empty=drop")
        made = then(start, overrides, f"texts cut at {longest} tokens", data=replace(settings, max_length=longest))
        found.append(replace(made, data=cut))
    return found


def cut_at(data: Data, length: int) -> Data:
    """The examples that have a target left."""

    def left(examples: Sequence[Example]) -> list[Example]:
        cut = (replace(one, tokens=one.tokens[:length], target=one.target[:length]) for one in examples)
        return [one for one in cut if any(one.target)]

    return replace(data, train=left(data.train), eval=left(data.eval))
