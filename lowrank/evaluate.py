"""Measuring a model: held-out loss, generated texts and their scores, and the base's result kept for the next run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lowrank import schema
from lowrank.data.chat import Example
from lowrank.data.pack import Batch
from lowrank.eval.generate import check_room, generate
from lowrank.eval.heldout import held_out
from lowrank.eval.scores import rouge_l, scores
from lowrank.eval.stats import bootstrap
from lowrank.keys import key
from lowrank.record.directory import write_json
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.metrics import Metrics

DOCUMENTS = 16  # of a held-out batch


@dataclass(frozen=True)
class Evaluation:
    """``metrics`` as summary.json holds them, and a text for each example that was generated from."""

    metrics: dict[str, Any]
    texts: list[str]


class Evaluator:
    """Evaluates a model on held-out examples; nothing of the model, its modes or torch's generators changes.

    ``loss(model, batch)`` sums over a batch's targets; ``stop`` are tokens that end a text beside the model's own.
    With ``eval.limit`` the examples are a keyed draw, of which the first ``eval.generate.limit`` are generated from.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        settings: schema.Eval,
        *,
        collate: Callable[[Sequence[Example]], Batch],
        loss: Callable[[nn.Module, Any], Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
        stop: Sequence[int],
        seed: int,
    ) -> None:
        self.stop = stop
        self.tokenizer, self.settings, self.loss, self.autocast = tokenizer, settings, loss, autocast
        self.collate = collate
        order = torch.randperm(len(examples), generator=key(seed, "eval order")).tolist()
        self.examples = [examples[i] for i in order[: settings.limit or len(order)]]
        self.sampled = self.examples[: settings.generate.limit]

    def held_out(self, model: nn.Module) -> dict[str, float]:
        by_length = sorted(self.examples, key=lambda example: len(example.tokens))  # little padding where it is padded
        batches = (self.collate(by_length[i : i + DOCUMENTS]) for i in range(0, len(by_length), DOCUMENTS))
        return held_out(model, batches, self.loss, self.autocast)

    def check_room(self, model: Any) -> None:
        """Raises ConfigError where a prompt that is generated from leaves no room for the new tokens."""
        if self.prompts:
            check_room(model, self.prompts, self.settings.generate.max_new_tokens)

    def generated(self, model: nn.Module) -> Evaluation:
        """Texts from the prompts and their scores against the references; empty where nothing is generated."""
        if not self.sampled:
            return Evaluation({}, [])
        options = asdict(self.settings.generate)
        options.pop("limit")
        with self.autocast():
            drawn = generate(model, self.tokenizer, self.prompts, stop=self.stop, **options)
        texts = [text.strip() for text, *_ in drawn]
        return Evaluation(dict(scores(texts, self.references)), texts)

    def whole(self, model: nn.Module) -> Evaluation:
        generated = self.generated(model)
        return Evaluation({**self.held_out(model), **generated.metrics}, generated.texts)

    def cached(self, model: nn.Module, what: dict[str, Any], cache: Path) -> Evaluation:
        """``whole`` of the untouched base, kept in ``cache`` by ``what`` it depends on: a sweep pays for it once."""
        name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        path = cache / "evaluations" / f"{name}.json"
        if path.exists():
            return Evaluation(**json.loads(path.read_text(encoding="utf-8")))
        found = self.whole(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(found))
        return found

    @property
    def prompts(self) -> list[Sequence[int]]:
        return [example.tokens[: example.target.index(True)] for example in self.sampled]

    @property
    def references(self) -> list[str]:
        return [example.reference for example in self.sampled]

    def gain(self, before: Evaluation | None, after: Evaluation) -> dict[str, float] | None:
        """ROUGE-L after less before, paired over examples, with its 95 % bootstrap interval."""
        if before is None or not before.texts or not after.texts:
            return None
        pairs = zip(rouge_l(after.texts, self.references), rouge_l(before.texts, self.references), strict=True)
        return asdict(bootstrap([a - b for a, b in pairs], seed=0))

    def samples(self, before: Evaluation | None, after: Evaluation) -> list[dict[str, Any]]:
        """The rows of samples.jsonl."""
        base = before.texts if before is not None and before.texts else [None] * len(self.sampled)
        return [
            {"row": e.row, "prompt": e.prompt, "reference": e.reference, "base": b, "tuned": t}
            for e, b, t in zip(self.sampled, base, after.texts, strict=False)
        ]


class PeriodicEvaluation(Hook):
    """The held-out loss every so many steps and after the last; it only looks, so a run's weights cannot tell."""

    def __init__(
        self,
        evaluator: Evaluator,
        model: nn.Module,
        metrics: Metrics,
        tracker: Any,
        *,
        every: int,
        last: int,
        evaluating: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.evaluator, self.model, self.metrics, self.tracker = evaluator, model, metrics, tracker
        self.every, self.last, self.evaluating = every, last, evaluating
        self.pending: StepRecord | None = None  # the step of an evaluation that was broken off
        self.found: tuple[int, dict[str, float]] | None = None

    def after_step(self, record: StepRecord) -> None:
        if record.step == self.last or (self.every and record.step % self.every == 0):
            self.pending = record
            with self.evaluating():
                loss = self.evaluator.held_out(self.model)
            self.pending, self.found = None, (record.step, loss)
            self.metrics.write({"event": "eval", "step": record.step, **self.found[1]})
            if self.tracker is not None:
                self.tracker.evaluated(*self.found)

    def loss_at(self, step: int) -> float | None:
        return self.found[1]["loss"] if self.found and self.found[0] == step else None

    def latest(self, step: int) -> dict[str, float]:
        """Of this very step: a run resumed at its end has not evaluated it yet."""
        return self.found[1] if self.found and self.found[0] == step else self.evaluator.held_out(self.model)
