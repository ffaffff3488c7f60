"""A group's ledger: one base, and of everything else what each of its runs takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli import SMALL

from lowrank import assemble
from lowrank.compose import compose
from lowrank.ledger.group import fullest, of_group
from lowrank.ledger.ledger import Ledger
from lowrank.ledger.predict import predict


@pytest.fixture(scope="module")
def ledgers(rows: Path) -> list[Ledger]:
    found = []
    for rank in (2, 16):
        config = compose([*SMALL, "model=tiny_llama", f"data.path={rows}", f"adapter.r={rank}"])
        parts = assemble.parts(config)
        found.append(predict(parts, assemble.data(config, parts.tokenizer), interpreter=300_000_000))
    return found


def test_the_base_counts_once_and_what_trains_as_often_as_it_is_there(ledgers: list[Ledger]) -> None:
    small, large = ledgers
    both = of_group(ledgers)
    assert both is not None
    for name in ("interpreter", "weights", "buffers"):
        assert both.parts[name] == small.parts[name] == large.parts[name]
    for name in ("adapters", "gradients", "optimizer", "activations"):
        assert both.parts[name] == small.parts[name] + large.parts[name] > large.parts[name]
    assert both.shape.tokens == small.shape.tokens + large.shape.tokens


def test_a_groups_step_is_the_sum_of_its_parts(ledgers: list[Ledger]) -> None:
    both = of_group([*ledgers, ledgers[0]])
    assert both is not None
    steps = sum(size for name, size in both.parts.items() if name not in ("evaluation", "loading"))
    alone = {name: size for name, size in ledgers[1].parts.items() if name not in ("evaluation", "loading")}
    assert steps - both.phases["step"] == sum(alone.values()) - ledgers[1].phases["step"]
    assert both.peak > max(one.peak for one in ledgers)


def test_of_a_run_without_a_prediction_there_is_none(ledgers: list[Ledger]) -> None:
    assert of_group([ledgers[0], None]) is None


def test_a_pass_is_as_large_as_the_largest_that_will_come(ledgers: list[Ledger]) -> None:
    tokens = [[[50], [10, 10], [30]], [[20], [90, 5]]]
    assert fullest(tokens) == pytest.approx((90 + 10) / (50 + 90))
    whole, part = of_group(ledgers), of_group(ledgers, 0.5)
    assert whole is not None
    assert part is not None
    assert part.parts["activations"] == pytest.approx(whole.parts["activations"] / 2, abs=1)
    assert part.parts["adapters"] == whole.parts["adapters"]
