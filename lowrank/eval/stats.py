"""How sure a mean difference is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowrank.keys import key

AT_ONCE = 1 << 22  # resampled values held at a time


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval, in the unit of what was averaged."""

    mean: float
    low: float
    high: float


def bootstrap(differences: Sequence[float], *, seed: int, repeats: int = 2000, level: float = 0.95) -> Interval:
    """The mean of paired differences (after − before, per example) and its percentile bootstrap interval.

    Examples are resampled with replacement ``repeats`` times (Efron, 1979); the draws depend on ``seed``
    alone. ValueError for no differences.
    """
    values = torch.tensor(differences, dtype=torch.float64)  # (n,)
    if values.numel() == 0:
        raise ValueError("no differences to average")
    generator = key(seed, "bootstrap")
    rows = max(1, AT_ONCE // len(values))
    means = []
    for start in range(0, repeats, rows):
        shape = (min(rows, repeats - start), len(values))
        means.append(values[torch.randint(len(values), shape, generator=generator)].mean(dim=1))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), tails).tolist()
    return Interval(values.mean().item(), low, high)
