"""Which examples stand in which step: a pure function of (seed, epoch, index), so that nothing needs resuming."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from lowrank.data.best_fit import best_fit
from lowrank.data.pack import Batch, Document
from lowrank.keys import digest, key


class Batches:
    """The micro-batches of every optimizer step, from 1.

    An epoch is a keyed permutation cut into micro-batches, of ``micro_batch`` examples or of at most
    ``micro_batch_tokens`` tokens, and these into steps of ``accumulate``; the last of each may be short. Every
    example comes once an epoch. A document longer than the token budget is a micro-batch of its own.

    ``packing`` says how a budget is filled: ``in_order`` as the permutation has it, until the next document would not
    fit; ``best_fit`` with documents of a stretch of it that fit together, such packs then in a keyed order.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        collate: Callable[[Sequence[Document]], Batch],
        *,
        seed: int,
        micro_batch: int | None,
        micro_batch_tokens: int | None,
        accumulate: int,
        packing: str = "best_fit",
    ) -> None:
        if not documents:
            raise ValueError("no examples to order")
        self.documents, self.collate, self.seed = documents, collate, seed
        self.micro_batch, self.micro_batch_tokens, self.accumulate = micro_batch, micro_batch_tokens, accumulate
        self.packing = packing
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self.ends = [0]  # of each epoch so far, the last of its steps; before the first, 0

    def at(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step ``step`` (1 is the first)."""
        return [self.collate([self.documents[i] for i in indices]) for indices in self.indices(step)]

    def indices(self, step: int) -> list[list[int]]:
        while step > self.ends[-1]:
            self.ends.append(self.ends[-1] + len(self.epoch(len(self.ends) - 1)))
        epoch = bisect.bisect_left(self.ends, step) - 1
        return self.epoch(epoch)[step - self.ends[epoch] - 1]

    def tokens(self, step: int) -> list[int]:
        """Of each micro-batch of a step."""
        return [sum(len(self.documents[i].tokens) for i in micro) for micro in self.indices(step)]

    def steps(self, epochs: float) -> int:
        """Optimizer steps in ``epochs`` passes over the data, a started step counting whole."""
        whole = int(epochs)
        total = sum(len(self.epoch(e)) for e in range(whole))
        return total + math.ceil(round((epochs - whole) * len(self.epoch(whole)), 6)) if epochs > whole else total

    def fingerprint(self, steps: int) -> str:
        """A hash of the data order of the first ``steps`` steps."""
        rows = [[self.documents[i].row for i in micro] for step in range(1, steps + 1) for micro in self.indices(step)]
        return f"{digest(rows):016x}"

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        """Steps → micro-batches → indices of examples."""
        order = torch.randperm(len(self.documents), generator=key(self.seed, "order", epoch)).tolist()
        if not self.micro_batch_tokens:
            micro = self.by_examples(order)
        elif self.packing == "in_order":
            micro = self.by_tokens(order, self.micro_batch_tokens)
        else:
            micro = self.by_best_fit(order, self.micro_batch_tokens, epoch)
        return [micro[i : i + self.accumulate] for i in range(0, len(micro), self.accumulate)]

    def by_examples(self, order: list[int]) -> list[list[int]]:
        size = self.micro_batch or 1
        return [order[i : i + size] for i in range(0, len(order), size)]

    def by_tokens(self, order: list[int], budget: int) -> list[list[int]]:
        """Fills each micro-batch in the epoch's order until the next document would not fit."""
        micro: list[list[int]] = []
        room = 0
        for index in order:
            length = len(self.documents[index].tokens)
            if not micro or length > room:
                micro.append([])
                room = budget
            micro[-1].append(index)
            room -= length
        return micro

    def by_best_fit(self, order: list[int], budget: int, epoch: int) -> list[list[int]]:
        """Full packs, shuffled: best fit makes those with the longest documents first."""
        packs = best_fit(order, [len(document.tokens) for document in self.documents], budget)
        return [packs[i] for i in torch.randperm(len(packs), generator=key(self.seed, "packs", epoch)).tolist()]
