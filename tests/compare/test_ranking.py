"""What a comparison shows: metrics, keys, order, reference, fronts."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from sweeping import change, copied

from lowrank.compare.explain import effects, explained
from lowrank.compare.front import front
from lowrank.compare.groups import gather
from lowrank.compare.ranking import Choice, Ranking, ranked
from lowrank.errors import ConfigError

LOSS = "eval.after.loss"


def order(ranking: Ranking) -> list[str]:
    return [row.group.label(["adapter.r", "optim.lr"]) for row in ranking.rows]


def test_the_best_comes_first_and_reversed_last(sweep: Path) -> None:
    results = gather([sweep])
    down = order(ranked(results, Choice()))
    assert down[0] == "adapter.r=8 optim.lr=0.001"
    assert down[-1] == "adapter.r=4 optim.lr=0.01"
    assert order(ranked(results, Choice(reverse=True))) == down[::-1]


def test_rows_are_sorted_by_a_key_or_another_metric_too(sweep: Path) -> None:
    results = gather([sweep])
    by_rank = [row.group.keys["adapter.r"] for row in ranked(results, Choice(sort="adapter.r")).rows]
    assert by_rank == [4, 4, 8, 8]
    by_loss = order(ranked(results, Choice(metrics=("seconds",), sort=LOSS)))
    assert by_loss == order(ranked(results, Choice()))


def test_more_is_better_of_scores_and_of_what_is_said_to_be(original: Path, tmp_path: Path) -> None:
    for name, score in (("a", 10.0), ("b", 30.0), ("c", 20.0)):
        copied(original, tmp_path / name, 3.0, adapter__r=ord(name))
        change(tmp_path / name, eval={"after": {"loss": 3.0, "rougeL": score}}, own=score)
    results = gather([tmp_path])
    for choice in (Choice(metrics=("eval.after.rougeL",)), Choice(metrics=("own",), higher=("own",))):
        assert [chr(row.group.keys["adapter.r"]) for row in ranked(results, choice).rows] == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("against", "named"),
    [
        ("best", "adapter.r=8 optim.lr=0.001"),
        ("first", "adapter.r=4 optim.lr=0.001"),
        ("adapter.r=4,optim.lr=0.01", "adapter.r=4 optim.lr=0.01"),
        ("r=8,lr=0.01,seed=2", "adapter.r=8 optim.lr=0.01"),
    ],
)
def test_the_reference_is_the_best_the_first_a_run_or_keys(sweep: Path, against: str, named: str) -> None:
    ranking = ranked(gather([sweep]), Choice(against=against))
    (reference,) = [row for row in ranking.rows if row.reference]
    assert reference.group.label(["adapter.r", "optim.lr"]) == named
    assert [row.tested[LOSS] is None for row in ranking.rows] == [row.reference for row in ranking.rows]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (Choice(metrics=("eval.after.los",)), "Did you mean 'eval.after.loss'"),
        (Choice(keys=("adapter.rr",)), "Did you mean 'adapter.r'"),
        (Choice(keys=("loop.seed",)), "--group-over"),
        (Choice(sort="optim.lrr"), "Did you mean 'optim.lr'"),
        (Choice(against="adapter.r=8"), "2 groups are that"),
        (Choice(against="adapter.r=64"), "0 groups are that"),
    ],
)
def test_what_no_run_has_is_refused_with_the_nearest_name(sweep: Path, choice: Choice, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ranked(gather([sweep]), choice)


def test_nothing_on_the_front_is_beaten_and_all_else_is() -> None:
    draw = random.Random(0)
    quality = [draw.choice([1.0, 2.0, 3.0, 4.0]) for _ in range(60)]
    cost = [draw.choice([1.0, 2.0, 3.0, 4.0, 5.0]) for _ in range(60)]
    for higher in (False, True):
        found = front(quality, cost, higher=higher)
        for place, on in enumerate(found):
            as_good = [(q >= quality[place]) if higher else (q <= quality[place]) for q in quality]
            beaten = any(
                good and c <= cost[place] and (q, c) != (quality[place], cost[place])
                for good, q, c in zip(as_good, quality, cost, strict=True)
            )
            assert on == (not beaten)


def test_what_was_not_measured_is_on_no_front_and_keeps_nothing_off_it() -> None:
    assert front([1.0, None, 2.0], [5.0, 1.0, None], higher=False) == [True, False, False]


def test_a_key_that_decides_explains_all_and_one_that_does_not_nothing() -> None:
    assert explained([[1.0, 1.1, 1.2, 1.3], [5.0, 5.1, 5.2, 5.3]]) == pytest.approx(1 - (10 / 6) / (42 / 7))
    shares = [explained(levels) for levels in itertools.pairwise([[1.0, 4.0], [2.0, 3.0], [1.0, 4.0]])]
    assert shares == [0.0, 0.0]


def test_one_run_that_diverged_does_not_decide_what_explains(original: Path, tmp_path: Path) -> None:
    for place, (rank, rate) in enumerate(itertools.product((2, 4, 8, 16), (1e-4, 1e-3, 1e-2))):
        loss = 3.0 - rank / 16 + (1e4 if (rank, rate) == (2, 1e-2) else 0.001 * place)
        copied(original, tmp_path / str(place), loss, adapter__r=rank, optim__lr=rate)
    ranking = ranked(gather([tmp_path]), Choice())
    found = effects(ranking.results.groups, ranking.keys, LOSS)
    assert found[0].key == "adapter.r"
    assert (found[0].share or 0) > 0.8


def test_one_value_a_level_tells_nothing_of_shares() -> None:
    assert explained([[1.0], [2.0], [3.0]]) is None
    assert explained([[1.0, 1.0], [1.0]]) is None
