"""The range test's suggestion, on curves of which it is known."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lowrank.report import lr_range
from lowrank.train.schedule import schedule


def rows(fall: float = -3.0, low: float = -1.5, steps: int = 80) -> list[dict[str, Any]]:
    """Rates from 1e-6 to 1; the loss falls from 4 to 2 around 10^fall and rises again from 10^low on."""
    factor = schedule("exponential", warmup=0, total=steps, options={"start": 1e-6})
    return [{"event": "step", "step": n, "lr": factor(n), "loss": loss(factor(n), fall, low)} for n in range(1, steps)]


def loss(rate: float, fall: float, low: float) -> float:
    x = math.log10(rate)
    return 4 - 2 / (1 + math.exp(-4 * (x - fall))) + max(0.0, x - low) ** 2 * 8


def test_it_finds_where_the_loss_falls_fastest_and_where_it_is_lowest() -> None:
    found = lr_range.range_of(rows())
    assert found is not None
    assert math.log10(found.steepest) == pytest.approx(-3.0, abs=0.3)
    assert math.log10(found.lowest) == pytest.approx(-1.5, abs=0.4)
    assert found.to_dict()["tenth_of_lowest"] == pytest.approx(found.lowest / 10)


def test_a_cliff_after_the_minimum_is_no_fall() -> None:
    """Only what comes before the lowest loss counts: a loss that has run away falls back at times."""
    told = rows()
    told += [{"event": "step", "lr": 1.0 + n, "loss": value} for n, value in enumerate([90.0, 90.0, 8.0, 8.0])]
    found = lr_range.range_of(told)
    assert found is not None
    assert found.steepest < 1e-2


@pytest.mark.parametrize("told", [[], rows()[:5], [{"lr": 10.0**n, "loss": float(n + 9)} for n in range(-8, 3)]])
def test_of_too_few_steps_or_a_loss_that_only_rises_nothing_is_said(told: list[dict[str, Any]]) -> None:
    assert lr_range.range_of(told) is None


def test_steps_that_were_not_finite_are_left_out() -> None:
    told = rows()
    told[10]["loss"] = None
    assert lr_range.range_of(told) is not None


def test_a_page_has_the_chart_only_for_a_range_test() -> None:
    config = {"schedule": {"kind": "exponential"}}
    (chart,) = lr_range.charts(rows(), config)
    assert "falls fastest" in chart
    assert lr_range.charts(rows(), {"schedule": {"kind": "linear"}}) == []
    assert lr_range.charts([], config) == []


def test_the_line_names_the_rates_and_is_empty_of_any_other_run() -> None:
    told = lr_range.line({"lr_range": {"steepest": 2e-3, "lowest": 0.03, "tenth_of_lowest": 3e-3}})
    assert told == "the loss fell fastest at 2e-3; lowest at 3e-2, a tenth of which is 3e-3"
    assert lr_range.line({"lr_range": None}) == lr_range.line({}) == ""
