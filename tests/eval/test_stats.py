from __future__ import annotations

import pytest
import torch

from lowrank.eval import stats
from lowrank.eval.stats import Interval, bootstrap

VALUES = torch.randn(30, generator=torch.Generator().manual_seed(2)).tolist()


def test_95_percent_intervals_cover_the_true_mean_about_as_often() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(300):
        found = bootstrap((2 + torch.randn(50, generator=generator)).tolist(), seed=trial, repeats=500)
        covered += found.low <= 2 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_interval_is_as_wide_as_theory_says() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = bootstrap(values.tolist(), seed=0)
    assert found.mean == pytest.approx(values.mean().item())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.1)
    narrow = bootstrap(values.tolist(), seed=0, level=0.5)
    assert found.low < narrow.low < narrow.mean < narrow.high < found.high


def test_the_seed_alone_decides_and_the_global_generator_stays() -> None:
    state = torch.get_rng_state()
    first = bootstrap(VALUES, seed=0)
    assert bootstrap(VALUES, seed=0) == first
    assert bootstrap(VALUES, seed=1) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_the_draws_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap([1.0, 2.0, 5.0, -1.0, 0.5], seed=0)
    monkeypatch.setattr(stats, "AT_ONCE", 64)
    assert bootstrap([1.0, 2.0, 5.0, -1.0, 0.5], seed=0) == whole


def test_equal_differences_leave_no_doubt_and_none_are_refused() -> None:
    assert bootstrap([3.0] * 7, seed=0) == Interval(3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="no differences"):
        bootstrap([], seed=0)
