"""The run's examples, tokenised, and the order and number of steps in which they are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lowrank.adapters.base import Adapter
from lowrank.adapters.inject import apply, hooks
from lowrank.adapters.sites import adapted
from lowrank.assemble.resolved import Parts, skeleton
from lowrank.data import chat, sources
from lowrank.data.order import Batches
from lowrank.data.pack import Batch, Document, pack
from lowrank.errors import ConfigError
from lowrank.eval.generate import room, taken
from lowrank.models.cache import cache
from lowrank.schema import Config
from lowrank.train.schedule import Schedule, schedule


@dataclass(frozen=True)
class Data:
    """The examples of a run, tokenised."""

    split: sources.Split
    train: list[chat.Example]
    eval: list[chat.Example]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        first = f"data: {self.split.name}, {len(self.train):,} examples to train on, {len(self.eval):,} held out"
        return "\n".join([first, *self.notes])


def data(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Raises DataError for what a file, a column or a row has wrong."""
    split = sources.load(config.data, cache())
    kept: dict[str, list[chat.Example]] = {}
    notes = [*split.notes]
    for what, records in (("train", split.train), ("eval", split.eval)):
        kept[what], dropped = chat.examples(
            records,
            tokenizer,
            template=config.data.template,
            train_on=config.data.train_on,
            max_length=config.data.max_length,
            on_empty=config.data.on_empty,
            what=what,
        )
        if dropped:
            notes.append(f"data: {dropped:,} {what} examples without a target token dropped")
    return Data(split, kept["train"], kept["eval"], tuple(notes))


def batches(config: Config, data: Data, collate: Callable[[Sequence[Document]], Batch]) -> Batches:
    loop = config.loop
    return Batches(
        data.train,
        collate,
        seed=loop.seed,
        micro_batch=loop.micro_batch,
        micro_batch_tokens=loop.micro_batch_tokens,
        packing=loop.packing,
        accumulate=loop.accumulate,
    )


def steps_and_schedule(config: Config, order: Batches) -> tuple[int, Schedule]:
    """Optimizer steps of the whole run, and the learning rate's factor at each."""
    total = config.loop.steps or order.steps(config.loop.epochs or 1)
    wanted = config.schedule
    try:
        return total, schedule(wanted.kind, warmup=wanted.warmup, total=total, options=wanted.options)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_length(parts: Parts, data: Data) -> None:
    """Raises ConfigError, before a weight is read, where a method's course over time does not fit the run's steps, or
    the longest text not the positions that a method's own rows leave."""
    steps, _ = steps_and_schedule(parts.config, batches(parts.config, data, pack))
    model = apply(skeleton(parts.config), parts.plan)
    over_time = hooks(model, steps)
    if parts.config.optim.in_backward:
        refuse_all_gradients(model, over_time)
    left, longest = room(model), max(len(example.tokens) for example in (*data.train, *data.eval))
    if taken(model) and left is not None and longest > left:
        raise ConfigError(
            f"data.max_length: a text of {longest:,} tokens exceeds the {left:,} of the model's positions that "
            f"adapter.length leaves. Lower one of the two."
        )


def refuse_all_gradients(model: nn.Module, over_time: Sequence[Any]) -> None:
    """Raises ConfigError, for ``optim.in_backward``, where a method wants all gradients before the first is used."""
    penalised = (type(one.adapter) for _, one in adapted(model) if type(one.adapter).penalty is not Adapter.penalty)
    who = next((cls.__name__ for cls in (*penalised, *map(type, over_time))), None)
    if who is not None:
        raise ConfigError(f"optim.in_backward: true is not allowed; false, because {who} needs all gradients together.")
