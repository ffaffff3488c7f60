"""Data order: every example once an epoch, and a step's batches a pure function of (seed, step)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from documents import texts

from lowrank.data.order import Batches
from lowrank.data.pack import pack


def batches(count: int = 23, **changes: Any) -> Batches:
    lengths = [1 + (7 * i) % 13 for i in range(count)]
    options = {"seed": 0, "micro_batch": 4, "micro_batch_tokens": None, "accumulate": 2}
    return Batches(texts(lengths), pack, **{**options, **changes})


def by_tokens(budget: int, **changes: Any) -> Batches:
    return batches(micro_batch=None, micro_batch_tokens=budget, **changes)


ORDERS = {
    "examples": lambda: batches(),
    "one at a time": lambda: batches(micro_batch=1, accumulate=1),
    "more than there are": lambda: batches(micro_batch=100, accumulate=5),
    "tokens": lambda: by_tokens(20),
    "tokens, fewer than a document has": lambda: by_tokens(3, accumulate=3),
    "tokens in order": lambda: by_tokens(20, packing="in_order"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_every_example_comes_once_an_epoch(order: str) -> None:
    made = ORDERS[order]()
    first, second = made.steps(1), made.steps(2)
    for steps in (range(1, first + 1), range(first + 1, second + 1)):
        seen = [index for step in steps for micro in made.indices(step) for index in micro]
        assert sorted(seen) == list(range(23))


@pytest.mark.parametrize("order", ORDERS)
def test_a_steps_batches_do_not_depend_on_which_were_asked_for_before(order: str) -> None:
    made, fresh = ORDERS[order](), ORDERS[order]()
    steps = made.steps(3)
    forwards = {step: made.indices(step) for step in range(1, steps + 1)}
    backwards = {step: fresh.indices(step) for step in range(steps, 0, -1)}
    assert forwards == backwards
    assert [batch.rows for batch in made.at(2)] == [tuple(100 + i for i in micro) for micro in forwards[2]]


def test_epochs_and_seeds_have_orders_of_their_own_and_a_seed_repeats_its_own() -> None:
    one, same, other = batches(seed=1), batches(seed=1), batches(seed=2)
    epoch = one.steps(1)
    assert [one.indices(s) for s in range(1, 10)] == [same.indices(s) for s in range(1, 10)]
    assert one.indices(1) != other.indices(1)
    assert one.indices(1) != one.indices(epoch + 1)


def test_drawing_an_order_leaves_the_default_generator_alone() -> None:
    before = torch.get_rng_state()
    batches().at(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_accumulation_cuts_the_same_micro_batches_into_longer_steps() -> None:
    single, triple = batches(accumulate=1), batches(accumulate=3)
    flat = [micro for step in range(1, single.steps(1) + 1) for micro in single.indices(step)]
    grouped = [micro for step in range(1, triple.steps(1) + 1) for micro in triple.indices(step)]
    assert flat == grouped
    assert [len(triple.indices(step)) for step in (1, 2)] == [3, 3]


def test_an_epochs_last_step_may_be_short() -> None:
    made = batches(count=23, micro_batch=4, accumulate=2)  # 6 micro-batches of 4, 4, 4, 4, 4, 3
    assert [[len(micro) for micro in made.indices(step)] for step in (1, 2, 3)] == [[4, 4], [4, 4], [4, 3]]
    assert made.steps(1) == 3


@pytest.mark.parametrize("budget", [13, 20, 50, 1000])
def test_in_order_a_token_budget_is_filled_while_the_next_document_fits(budget: int) -> None:
    made = by_tokens(budget, accumulate=1, packing="in_order")
    lengths = [len(d.tokens) for d in made.documents]
    epoch = [made.indices(step)[0] for step in range(1, made.steps(1) + 1)]
    sizes = [sum(lengths[i] for i in micro) for micro in epoch]
    assert max(sizes) <= budget
    for size, following in zip(sizes, epoch[1:], strict=False):
        assert size + lengths[following[0]] > budget


@pytest.mark.parametrize("packing", ["in_order", "best_fit"])
def test_a_document_longer_than_the_budget_is_a_micro_batch_of_its_own(packing: str) -> None:
    made = by_tokens(5, accumulate=1, packing=packing)
    long = {i for i, d in enumerate(made.documents) if len(d.tokens) > 5}
    for step in range(1, made.steps(1) + 1):
        [micro] = made.indices(step)
        assert len(micro) == 1 or not long & set(micro)


@pytest.mark.parametrize("per_epoch", [1, 3, 7, 10])
def test_a_fraction_of_an_epoch_is_that_fraction_of_its_steps_rounded_up(per_epoch: int) -> None:
    made = batches(count=per_epoch, micro_batch=1, accumulate=1)
    for tenths in range(1, 40):
        assert made.steps(tenths / 10) == -(-tenths * per_epoch // 10)


def test_steps_of_whole_epochs_add_up_where_epochs_differ() -> None:
    made = by_tokens(20)
    assert made.steps(3) == sum(len(made.epoch(epoch)) for epoch in range(3))


def test_the_fingerprint_is_of_the_first_steps_alone() -> None:
    assert batches().fingerprint(5) == batches().fingerprint(5)
    assert batches().fingerprint(5) != batches(seed=1).fingerprint(5)
    assert batches().fingerprint(5) != batches().fingerprint(6)
    assert batches().fingerprint(5) != batches(accumulate=1).fingerprint(5)


def test_no_examples_at_all_is_an_error_and_not_an_endless_search() -> None:
    with pytest.raises(ValueError, match="no examples"):
        batches(count=0)
