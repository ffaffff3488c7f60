"""How sure a mean over seeds is: Student's t, paired differences, their exact permutation test, and Holm's correction.

Seeds are few, so intervals are honest and wide: with two of them t is 12.7. No scipy: the distribution is here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

LEVEL = 0.95
EXACT = 14  # differences up to which every one of the 2ⁿ signs is tried


@dataclass(frozen=True)
class Estimate:
    """The mean of ``n`` values and the ends of its interval, which one value alone has not."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """The mean of ``n`` paired differences with its interval, and how surprising it would be if there were none."""

    p: float | None  # two-sided paired t-test; None for one pair, or where all differ by exactly the same
    exact: float | None  # two-sided sign-flip permutation test, which is never below 2/2ⁿ; None for one pair or many


def interval(values: Sequence[float], level: float = LEVEL) -> Estimate | None:
    """Mean and Student-t interval of independent ``values``; None for no values."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n if min(values) < max(values) else values[0]
    if n == 1:
        return Estimate(mean, None, None, 1)
    half = t_quantile(0.5 + level / 2, n - 1) * spread(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired(differences: Sequence[float], level: float = LEVEL) -> Difference | None:
    """Mean and interval of paired differences and the two tests that they are 0; None for no pair."""
    found = interval(differences, level)
    if found is None:
        return None
    error = spread(differences) / math.sqrt(found.n) if found.n > 1 else 0.0
    p = 2 * (1 - t_cdf(abs(found.mean) / error, found.n - 1)) if error > 0 else None
    return Difference(found.mean, found.low, found.high, found.n, p, sign_flip(differences))


def spread(values: Sequence[float]) -> float:
    """The sample's standard deviation (n − 1); exactly 0 where all values are the same."""
    if min(values) == max(values):
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def sign_flip(differences: Sequence[float]) -> float | None:
    """The share of all 2ⁿ ways to sign the differences whose mean lies as far from 0 as theirs (Fisher, 1935)."""
    n = len(differences)
    if not 2 <= n <= EXACT:
        return None
    seen = abs(math.fsum(differences))
    least = seen - 1e-12 * math.fsum(map(abs, differences))  # the same sum in another order of adding
    signs = itertools.product((1, -1), repeat=n)
    far = sum(abs(math.fsum(s * d for s, d in zip(way, differences, strict=True))) >= least for way in signs)
    return far / 2**n


def holm(found: Sequence[float | None]) -> list[float | None]:
    """p-values of one family of tests so adjusted that one false alarm among them is as rare as each says (Holm, 1979).

    None stays None and is no test.
    """
    order = sorted((p, place) for place, p in enumerate(found) if p is not None)
    adjusted: list[float | None] = [None] * len(found)
    highest = 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[place] = highest
    return adjusted


def t_cdf(t: float, df: float) -> float:
    """P(T ≤ t) of Student's t with ``df`` degrees of freedom."""
    if math.isinf(t):
        return 1.0 if t > 0 else 0.0
    tail = 0.5 * incomplete_beta(df / (df + t * t), df / 2, 0.5)
    return 1 - tail if t > 0 else tail


@lru_cache(maxsize=1024)
def t_quantile(p: float, df: float) -> float:
    """The t below which a share ``p`` in (0, 1) lies, by bisection."""
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly the other end does quickly
        return 1 - incomplete_beta(1 - x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    value, c, d = 1.0, 1.0, 0.0
    for place in range(500):
        m = place // 2
        if place == 0:
            term = 1.0
        elif place % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + term * d or 1e-300)
        c = 1 + term / c or 1e-300
        change = c * d
        value *= change
        if place and abs(change - 1) < 1e-15:
            break
    return math.exp(scale) / a * (value - 1)  # the fraction was begun at 1, which Lentz's algorithm may not be at 0
