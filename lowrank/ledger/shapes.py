"""The largest batches of a run: of training, of the held-out loss, of generating."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from lowrank import assemble
from lowrank.assemble import Data, Parts
from lowrank.data.pack import pack
from lowrank.evaluate import DOCUMENTS, Evaluator
from lowrank.ledger.ledger import Shape
from lowrank.schema import Config


@dataclass(frozen=True)
class Text:
    """A document of a length, of which the last tokens are targets."""

    tokens: list[int]
    target: list[bool]
    row: int = 0


def text(length: int, targets: int) -> Text:
    return Text([0] * length, [False] * (length - targets) + [True] * targets)


def texts(lengths: Sequence[int], targets: int) -> list[Text]:
    """Documents of these lengths with so many targets together, of each as large a share as of the others."""
    total, made, given, seen = sum(lengths), [], 0, 0
    for length in lengths:
        seen += length
        share = min(round(targets * seen / total) - given, length - 1)
        made.append(text(length, share))
        given += share
    return made


def of_data(parts: Parts, data: Data, packed: bool, a_target: float = 0.0) -> Shape:
    """Of the micro-batch that takes most where a target takes as much as ``a_target`` tokens."""
    order = assemble.batches(parts.config, data, pack)
    steps, _ = assemble.steps_and_schedule(parts.config, order)
    length = [len(one.tokens) for one in data.train]
    target = [sum(one.target) for one in data.train]

    def size(indices: Sequence[int]) -> tuple[int, int]:
        each = [length[i] for i in indices]
        return sum(each) if packed else max(each) * len(each), sum(target[i] for i in indices)

    micro = [micro for step in range(1, steps + 1) for micro in order.indices(step)]
    largest = max(micro, key=lambda m: (size(m)[0] + a_target * size(m)[1], size(m)))
    evaluation, prompts = of_evaluation(parts, data)
    source = f"those of the {len(data.train):,} examples to train on, over {steps:,} steps"
    return Shape(tuple(length[i] for i in largest), size(largest)[1], evaluation, prompts, packed, source)


def of_evaluation(parts: Parts, data: Data) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of the largest held-out batch, and of the largest batch of prompts."""
    settings = parts.config.eval
    chosen = Evaluator(
        parts.tokenizer,
        data.eval,
        settings,
        collate=pack,
        loss=assemble.loss(parts.config),
        autocast=nullcontext,  # nothing is evaluated
        stop=(),
        seed=parts.config.data.seed,
    )
    held_out = sorted(len(example.tokens) for example in chosen.examples)
    prompts = sorted(len(prompt) for prompt in chosen.prompts)
    return tuple(held_out[-DOCUMENTS:]), tuple(prompts[-settings.generate.batch :])


def at_most(config: Config, longest: int, packed: bool, why: str) -> Shape:
    """Without data: every text of ``longest`` tokens, and every token a target."""
    loop = config.loop
    count = loop.micro_batch or max(1, (loop.micro_batch_tokens or longest) // longest)
    step = (longest,) * count
    settings = config.eval
    held_out = (longest,) * min(DOCUMENTS, settings.limit or DOCUMENTS)
    room = longest - settings.generate.max_new_tokens
    prompts = (max(1, room),) * min(settings.generate.batch, settings.generate.limit)
    return Shape(step, sum(step) - count, held_out, prompts, packed, why)


def share(data: Data | None) -> float:
    """Of the tokens to train on, how many are targets; 1 without data."""
    if data is None:
        return 1.0
    return sum(sum(one.target) for one in data.train) / sum(len(one.tokens) for one in data.train)
