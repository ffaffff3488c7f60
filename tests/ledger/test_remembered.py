"""A prediction is made once for runs that take the same, and is then the one that would be made."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli import SMALL

from lowrank import assemble, compose
from lowrank.assemble import Data, Parts
from lowrank.ledger import remembered as memory
from lowrank.ledger.predict import predict
from lowrank.ledger.remembered import MOST, remembered

pytestmark = pytest.mark.usefixtures("cache")


def parts(rows: Path, *overrides: str) -> Parts:
    return assemble.parts(compose.compose(["model=tiny_llama", *SMALL, f"data.path={rows}", *overrides]))


@pytest.fixture
def data(rows: Path) -> Data:
    memory.made.clear()
    one = parts(rows)
    return assemble.data(one.config, one.tokenizer)


def test_what_weighs_nothing_is_predicted_once_and_the_process_is_as_it_is_now(rows: Path, data: Data) -> None:
    first = remembered(parts(rows), data, 100_000_000)
    other = parts(rows, "optim.lr=1e-5", "adapter.alpha=3", "schedule=cosine", "checkpoint.every=7")
    again = remembered(other, data, 130_000_000)

    assert len(memory.made) == 1
    assert again == predict(other, data, 130_000_000)
    assert again.peak == first.peak + 30_000_000


def test_another_shape_or_other_examples_are_predicted_anew_and_few_are_kept(rows: Path, data: Data) -> None:
    remembered(parts(rows), data, 0)
    larger = parts(rows, "adapter.r=3")
    assert remembered(larger, data, 0) == predict(larger, data, 0)
    assert len(memory.made) == 2
    memory.made *= MOST
    remembered(larger, assemble.data(larger.config, larger.tokenizer), 0)
    assert len(memory.made) == MOST
