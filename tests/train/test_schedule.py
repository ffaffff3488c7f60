"""Learning rates as a pure function of the step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from lowrank.train.schedule import schedule, warmup_steps

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("constant", {}),
    ("polynomial", {"power": 2.0}),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("inverse_sqrt", {}),
    ("warmup_stable_decay", {"num_decay_steps": 4}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
]


def factors(kind: str, warmup: float, total: int = 20, **options: Any) -> list[float]:
    made = schedule(kind, warmup=warmup, total=total, options=options)
    return [made(step) for step in range(1, total + 2)]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_first_step_is_at_one_over_warm_up_of_the_peak_and_the_peak_is_reached_at_its_end(
    kind: str, options: dict[str, Any], warmup: int
) -> None:
    found = factors(kind, warmup, **options)
    assert found[0] == pytest.approx(1 / max(1, warmup))
    assert found[:warmup] == pytest.approx([step / warmup for step in range(1, warmup + 1)])
    assert found[warmup] == pytest.approx(1.0)
    assert max(found) == pytest.approx(1.0)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_after_warm_up_it_is_transformers_schedule(kind: str, options: dict[str, Any]) -> None:
    unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, unused, 4, 20, options).lr_lambdas[0]  # theirs begins at 0
    assert factors(kind, 4, **options)[4:] == pytest.approx([theirs(done) for done in range(4, 21)])


def test_every_step_of_a_run_trains() -> None:
    for kind in ("linear", "cosine", "constant"):
        for total in (1, 2, 3, 50):
            for warmup in (0, 1, 2, 0.1, 0.5):
                made = schedule(kind, warmup=warmup, total=total)
                assert all(0 < made(step) <= 1 for step in range(1, total + 1)), (kind, total, warmup)


def test_linear_and_cosine_are_their_formulas() -> None:
    assert factors("linear", 2, total=10)[2:] == pytest.approx([1 - n / 8 for n in range(9)])
    assert factors("cosine", 2, total=10)[2:] == pytest.approx([(1 + math.cos(math.pi * n / 8)) / 2 for n in range(9)])
    assert factors("constant", 2, total=10) == pytest.approx([0.5, *[1.0] * 10])


def test_a_step_past_the_end_is_not_negative() -> None:
    assert [schedule(kind, warmup=0, total=5)(50) for kind in ("linear", "cosine")] == [0.0, 0.0]


def test_warm_up_below_one_is_a_fraction_of_the_run() -> None:
    assert [warmup_steps(w, 200) for w in (0, 0.03, 0.5, 1, 7, 300)] == [0, 6, 100, 1, 7, 300]
    assert factors("linear", 0.2) == factors("linear", 4)


def test_a_warm_up_longer_than_the_run_still_rises() -> None:
    assert factors("linear", 100, total=4) == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])


def test_order_of_calls_does_not_matter() -> None:
    for kind, options in KINDS:
        made = schedule(kind, warmup=4, total=20, options=options)
        backwards = [made(step) for step in range(21, 0, -1)][::-1]
        assert backwards == factors(kind, 4, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cosin", {}),
        ("reduce_lr_on_plateau", {}),
        ("greedy", {}),
        ("warmup_stable_decay", {}),
        ("polynomial", {"num_cycles": 2}),
        ("linear", {"num_cycles": 2}),
        ("cosine", {"num_cycles": 2}),
        ("constant", {"power": 2}),
    ],
)
def test_an_unknown_kind_or_option_is_an_error_and_never_ignored(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"schedule|valid"):
        schedule(kind, warmup=2, total=20, options=options)


def test_a_range_test_grows_by_the_same_factor_each_step_up_to_the_peak() -> None:
    found = factors("exponential", 0, total=9, start=1e-4)
    assert found[0] == pytest.approx(1e-4)
    assert found[8] == found[9] == 1.0
    assert [b / a for a, b in itertools.pairwise(found[:9])] == pytest.approx([10 ** (4 / 8)] * 8)


@pytest.mark.parametrize(
    ("warmup", "options", "named"),
    [(0, {"start": 0}, "start: 0"), (0, {"start": 2.0}, "start: 2"), (0, {"stop": 1}, "stop"), (3, {}, "warmup: 3")],
)
def test_a_range_test_refuses_what_it_cannot_do(warmup: float, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        schedule("exponential", warmup=warmup, total=9, options=options)
