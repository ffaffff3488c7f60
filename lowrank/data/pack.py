"""From examples to batches: documents end to end with their boundaries, or padded where a model needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

BOUNDARIES = "cu_seqlens"


class Document(Protocol):
    """What packing reads of an example: its tokens, which of them are learnt, and its row in the data file."""

    @property
    def row(self) -> int: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def target(self) -> Sequence[bool]: ...


@dataclass(frozen=True)
class Batch:
    """One forward's worth of documents.

    ``inputs`` are the model's keywords. ``positions`` (targets,) index the flattened batch·seq rows whose output
    predicts a target token, ``targets`` (targets,) are those tokens: a document's first token is never one.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    targets: Tensor
    rows: tuple[int, ...]  # data rows, in order
    real_tokens: int  # padding never counts

    def to(self, device: torch.device | str) -> Batch:
        """All but the boundaries, which are read on the host; without waiting for the device."""
        return self.with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In memory from which CUDA copies by itself."""
        return self.with_tensors(Tensor.pin_memory)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        inputs = {name: t if name == BOUNDARIES else change(t) for name, t in self.inputs.items()}
        return replace(self, inputs=inputs, positions=change(self.positions), targets=change(self.targets))


def pack(documents: Sequence[Document]) -> Batch:
    """Documents end to end in one row: positions restart, ``cu_seqlens`` carries the boundaries, nothing is padded."""
    lengths = [len(d.tokens) for d in documents]
    edges = torch.tensor([0, *lengths]).cumsum(0)  # (documents + 1,)
    positions, targets = target_rows(documents, edges[:-1].tolist())
    inputs = {
        "input_ids": torch.tensor([t for d in documents for t in d.tokens])[None],  # (1, tokens)
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],  # (1, tokens)
        BOUNDARIES: edges,
        # a 4D mask is passed on as it is: it keeps transformers from building one of (tokens, tokens)
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
    }
    return Batch(inputs, positions, targets, tuple(d.row for d in documents), sum(lengths))


def joined(batches: Sequence[Batch]) -> Batch:
    """Packs end to end, as the pack of all their documents in this order would be."""
    starts = list(accumulate((batch.inputs["input_ids"].shape[1] for batch in batches), initial=0))[:-1]
    edges = [b.inputs[BOUNDARIES][1:] + start for b, start in zip(batches, starts, strict=True)]
    inputs = {
        **batches[0].inputs,  # the mask that keeps transformers from building one
        **{name: torch.cat([b.inputs[name] for b in batches], 1) for name in ("input_ids", "position_ids")},
        BOUNDARIES: torch.cat([batches[0].inputs[BOUNDARIES][:1], *edges]),
    }
    return Batch(
        inputs,
        torch.cat([b.positions + start for b, start in zip(batches, starts, strict=True)]),
        torch.cat([b.targets for b in batches]),
        tuple(row for b in batches for row in b.rows),
        sum(b.real_tokens for b in batches),
    )


def pad(documents: Sequence[Document]) -> Batch:
    """Documents one a row, filled up on the right with token 0 that attention and loss never see."""
    lengths = [len(d.tokens) for d in documents]
    width = max(lengths)
    ids = torch.zeros(len(documents), width, dtype=torch.int64)  # (documents, width)
    for row, document in enumerate(documents):
        ids[row, : lengths[row]] = torch.tensor(document.tokens)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]  # (documents, width)
    positions, targets = target_rows(documents, [row * width for row in range(len(documents))])
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    return Batch(inputs, positions, targets, tuple(d.row for d in documents), sum(lengths))


def target_rows(documents: Sequence[Document], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(positions, targets) of documents that begin at ``starts``: token i is predicted by the output at i − 1."""
    pairs = [
        (start + i - 1, document.tokens[i])
        for document, start in zip(documents, starts, strict=True)
        for i in range(1, len(document.tokens))
        if document.target[i]
    ]
    positions, targets = zip(*pairs, strict=True) if pairs else ((), ())
    return torch.tensor(positions, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
