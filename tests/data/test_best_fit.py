"""Best fit: every document once, in the budget, hardly a token of it left over, and an order of its own an epoch."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from documents import texts

from lowrank.data.best_fit import STRETCH, best_fit
from lowrank.data.order import Batches
from lowrank.data.pack import pack

BUDGET = 256
LENGTHS = {
    "instructions": lambda draw: max(2, min(235, int(draw.gauss(96, 50)))),
    "long tail": lambda draw: max(2, min(BUDGET, int(draw.lognormvariate(3, 1)))),
    "halves": lambda draw: draw.choice([100, 128, 129, 156]),
    "all alike": lambda draw: 60,
    "some too long": lambda draw: draw.choice([5, 30, 90, 300, 900]),
}


def lengths(kind: str, count: int = 5_000, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [LENGTHS[kind](draw) for _ in range(count)]


def in_order(order: list[int], sizes: list[int]) -> int:
    """How many packs it takes where each is filled until the next document does not fit."""
    count, room = 0, -1
    for index in order:
        if sizes[index] > room:
            count, room = count + 1, BUDGET
        room -= sizes[index]
    return count


def fewest(sizes: list[int]) -> float:
    """Packs that are needed at least: for the tokens, and for the documents of half the budget or more, of which a
    pack holds one, or two of exactly the half."""
    halves = sum(size > BUDGET / 2 for size in sizes) + sizes.count(BUDGET // 2) / 2
    return max(sum(min(size, BUDGET) for size in sizes) / BUDGET, halves)


def order(count: int, seed: int = 1) -> list[int]:
    return random.Random(seed).sample(range(count), count)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", LENGTHS)
def test_every_document_is_in_one_pack_and_no_pack_of_several_is_over_the_budget(kind: str, seed: int) -> None:
    sizes = lengths(kind, 1_000 + seed, seed)
    packs = best_fit(order(len(sizes), seed), sizes, BUDGET)
    assert sorted(index for pack in packs for index in pack) == list(range(len(sizes)))
    assert all(len(pack) == 1 or sum(sizes[i] for i in pack) <= BUDGET for pack in packs)


@pytest.mark.parametrize("kind", ["instructions", "long tail", "halves"])
def test_packs_are_fuller_than_in_order_and_near_the_budget(kind: str) -> None:
    sizes = lengths(kind)
    packs = len(best_fit(order(len(sizes)), sizes, BUDGET))
    assert packs < 0.9 * in_order(order(len(sizes)), sizes)
    assert packs <= 1.04 * fewest(sizes)


@pytest.mark.parametrize("kind", LENGTHS)
def test_there_are_no_more_packs_than_the_theorem_allows(kind: str) -> None:
    """11/9 of the fewest possible and one, here of a single stretch."""
    sizes = lengths(kind, 120)
    assert sum(sizes) <= STRETCH * BUDGET or kind == "some too long"
    assert len(best_fit(order(120), sizes, BUDGET)) <= 11 / 9 * fewest(sizes) + 1


def test_no_two_packs_of_a_stretch_could_have_been_one() -> None:
    sizes = lengths("instructions", 120)
    filled = sorted(sum(sizes[i] for i in pack) for pack in best_fit(order(120), sizes, BUDGET))
    assert all(one + other > BUDGET for one, other in pairwise(filled))


def test_only_an_epochs_last_pack_is_far_from_full() -> None:
    """The emptiest of each stretch waits for the next one's documents."""
    sizes = lengths("instructions")
    packs = best_fit(order(len(sizes)), sizes, BUDGET)
    assert len(packs) > 20 * STRETCH
    assert all(sum(sizes[i] for i in pack) > BUDGET / 2 for pack in packs[:-1])


def test_documents_come_together_that_stood_near_each_other() -> None:
    """So an epoch's packs are as random as its order: nothing is sorted over the whole of it."""
    sizes = lengths("instructions")
    given = order(len(sizes))
    place = {index: at for at, index in enumerate(given)}
    stretch = STRETCH * BUDGET / (sum(sizes) / len(sizes))  # in documents
    packs = [[place[index] for index in pack] for pack in best_fit(given, sizes, BUDGET)]
    spread = sorted(max(places) - min(places) for places in packs)
    assert spread[len(spread) * 99 // 100] <= 3 * stretch < len(sizes) / 5
    assert spread[-1] <= 8 * stretch  # a document may wait for more than one stretch


def epochs(seed: int) -> list[list[list[int]]]:
    order = Batches(
        texts([2 + (7 * i) % 29 for i in range(300)]),
        pack,
        seed=seed,
        micro_batch=None,
        micro_batch_tokens=64,
        accumulate=1,
        packing="best_fit",
    )
    return [[micro for step in order.epoch(epoch) for micro in step] for epoch in (0, 1)]


def test_packs_differ_by_epoch_and_seed_and_a_seed_repeats_its_own() -> None:
    one, other = epochs(0), epochs(1)
    assert one == epochs(0)
    together = [{tuple(sorted(pack)) for pack in packs} for packs in (*one, *other)]
    for first, second in pairwise(together):
        assert len(first & second) < len(first) / 10


def test_full_packs_of_long_and_of_short_documents_are_mixed_over_an_epoch() -> None:
    """Best fit makes those with the longest documents first."""
    [packs, _] = epochs(0)
    sizes = [len(pack) for pack in packs]
    half = len(sizes) // 2
    assert abs(sum(sizes[:half]) / half - sum(sizes[half:]) / (len(sizes) - half)) < 1
