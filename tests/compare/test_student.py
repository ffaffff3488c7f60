"""Intervals, paired differences and their tests, against tables and full enumeration."""

from __future__ import annotations

import itertools
import math
from statistics import mean, stdev

import pytest

from lowrank.compare.student import holm, incomplete_beta, interval, paired, sign_flip, t_cdf, t_quantile


@pytest.mark.parametrize(
    ("df", "quantile"),
    [
        (1, 12.7062047362),
        (2, 4.3026527297),
        (3, 3.1824463053),
        (9, 2.2621571628),
        (30, 2.0422724563),
        (120, 1.9799304051),
    ],
)
def test_the_quantile_is_that_of_the_tables(df: int, quantile: float) -> None:
    assert t_quantile(0.975, df) == pytest.approx(quantile, abs=1e-9)
    assert t_quantile(0.025, df) == pytest.approx(-quantile, abs=1e-9)


@pytest.mark.parametrize("t", [-30.0, -1.0, 0.0, 0.3, 2.5, 400.0])
def test_one_degree_of_freedom_is_cauchys_and_two_have_a_closed_form(t: float) -> None:
    assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-13)
    assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-13)


def test_the_incomplete_beta_of_whole_numbers_is_the_binomial_sum() -> None:
    for x in (0.01, 0.3, 0.5, 0.77, 0.999):
        sums = sum(math.comb(6, k) * x**k * (1 - x) ** (6 - k) for k in range(2, 7))
        assert incomplete_beta(x, 2, 5) == pytest.approx(sums, abs=1e-14)


def test_an_interval_is_the_mean_and_t_standard_errors() -> None:
    values = [3.1, 2.9, 3.3]
    found = interval(values)
    assert found is not None
    half = 4.3026527297 * stdev(values) / math.sqrt(3)
    assert (found.mean, found.n) == (pytest.approx(mean(values)), 3)
    assert (found.low, found.high) == (pytest.approx(found.mean - half), pytest.approx(found.mean + half))


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    found = interval([2.0])
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == (2.0, None, None, 1)
    assert interval([]) is None
    assert paired([]) is None


def test_the_p_value_and_the_interval_agree_on_what_is_told_apart() -> None:
    for shift in (0.0, 0.05, 0.1, 0.2, 0.4, 1.0):
        found = paired([shift - 0.1, shift + 0.05, shift + 0.07, shift - 0.03])
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert found.p is not None
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_differences_without_spread_are_no_sample_to_test() -> None:
    found = paired([0.1, 0.1, 0.1])
    assert found is not None
    assert (found.mean, found.low, found.high, found.p) == (0.1, 0.1, 0.1, None)


@pytest.mark.parametrize(
    "differences",
    [[0.3, 0.5], [0.1, -0.2, 0.4], [1.0, 2.0, 3.0, 4.0], [0.1, 0.1, -0.1, 0.2, 0.0], [-3.0, 1.0, 1.0, 1.0]],
)
def test_the_permutation_test_counts_every_sign(differences: list[float]) -> None:
    seen = abs(mean(differences))
    means = [
        mean(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    assert sign_flip(differences) == sum(abs(one) >= seen - 1e-9 for one in means) / len(means)


def test_the_permutation_test_is_never_below_what_so_few_seeds_can_tell() -> None:
    assert sign_flip([5.0, 5.1]) == 0.5
    assert sign_flip([5.0, 5.1, 4.9]) == 0.25
    assert sign_flip([5.0]) is None


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, None, 0.005]) == [
        pytest.approx(x) if x else x for x in (0.03, 0.06, 0.06, None, 0.02)
    ]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
