"""Documents to pack: plain values with the three fields that packing reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowrank.keys import key


@dataclass(frozen=True)
class Text:
    row: int
    tokens: tuple[int, ...]
    target: tuple[bool, ...]


def texts(lengths: Sequence[int], *, vocabulary: int = 64, seed: int = 0) -> list[Text]:
    """Random documents; about half of the tokens are targets, the first of each among those marked as such."""
    made = []
    for index, length in enumerate(lengths):
        generator = key(seed, "text", index)
        tokens = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        target = (torch.rand(length, generator=generator) < 0.5).tolist()
        made.append(Text(100 + index, tuple(tokens), (True, *target[1:-1], True)[:length]))
    return made
