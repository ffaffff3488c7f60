"""All randomness is keyed, not sequenced: what is drawn depends on what it is for, never on what ran before.

``key(seed, "init", "model.layers.0.self_attn.q_proj")`` gives the same generator in every process, whatever
other sites, evaluations or log lines came first. So adding a target, evaluating more often or resuming
never moves a trajectory.
"""

from __future__ import annotations

import hashlib

import torch


def digest(*what: object) -> int:
    """A 63-bit integer that depends on every part of ``what`` (SHA-256 of their representations)."""
    text = "\x1f".join(repr(part) for part in what)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def key(seed: int, *what: object) -> torch.Generator:
    """A CPU generator for one purpose: ``key(0, "order", epoch)``, ``key(0, "init", path)``."""
    return torch.Generator().manual_seed(digest(seed, *what))


class Clock:
    """The time of a training run, read by everything random inside a forward pass.

    The loop sets it to (step, micro-batch) before each forward and never between a forward and its
    backward, so a recomputed forward reads the same time and draws the same masks. A clock that nobody
    sets (a model used in somebody's own loop) draws one seed a call from torch's default generator.
    """

    def __init__(self, seed: int = 0, rank: int = 0) -> None:
        self.seed, self.rank = seed, rank
        self.now: tuple[int, int] | None = None  # (optimizer step, micro-batch)

    def set(self, step: int, micro_batch: int) -> None:
        self.now = (step, micro_batch)

    def draw(self, group: str) -> int:
        """The seed of ``group``'s masks at this time: equal for all sites that share a group."""
        if self.now is None:
            return int(torch.randint(2**62, ()))
        return digest(self.seed, "dropout", self.rank, *self.now, group)
