"""Randomness is keyed: what is drawn depends on what it is for, never on what ran before."""

from __future__ import annotations

import subprocess
import sys

import torch

from lowrank.keys import Clock, digest, key


def test_a_key_draws_the_same_whatever_ran_before() -> None:
    first = torch.rand(5, generator=key(3, "init", "a.q_proj"))
    torch.manual_seed(99)
    torch.rand(7)
    key(3, "init", "a.k_proj").seed()
    assert torch.equal(first, torch.rand(5, generator=key(3, "init", "a.q_proj")))


def test_a_digest_is_the_same_in_another_process() -> None:
    code = "from lowrank.keys import digest; print(digest(0, 'order', 3))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == digest(0, "order", 3)


def test_every_part_of_a_key_counts_and_parts_do_not_run_together() -> None:
    keys = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a1"), (0, "a", "1"), (0, "a\x1f1"), (0, 1, "a")]
    assert len({digest(*parts) for parts in keys}) == len(keys)


def test_a_digest_is_a_seed_torch_takes() -> None:
    for n in range(200):
        assert 0 <= digest(n) < 2**63
        key(n)


def test_drawing_by_key_leaves_the_default_generator_alone() -> None:
    before = torch.get_rng_state()
    torch.rand(3, generator=key(0, "x"))
    clock = Clock(seed=1)
    clock.set(1, 0)
    clock.draw("group")
    assert torch.equal(before, torch.get_rng_state())


def test_a_set_clock_repeats_and_depends_on_seed_rank_step_micro_batch_and_group() -> None:
    def draw(seed: int, rank: int, step: int, micro_batch: int, group: str) -> int:
        clock = Clock(seed, rank)
        clock.set(step, micro_batch)
        assert clock.draw(group) == clock.draw(group)
        return clock.draw(group)

    times = [
        (0, 0, 1, 0, "g"),
        (1, 0, 1, 0, "g"),
        (0, 1, 1, 0, "g"),
        (0, 0, 2, 0, "g"),
        (0, 0, 1, 1, "g"),
        (0, 0, 1, 0, "h"),
    ]
    drawn = [draw(*time) for time in times]
    assert len(set(drawn)) == len(times)
    assert drawn == [draw(*time) for time in times]


def test_a_clock_that_nobody_sets_draws_from_the_default_generator() -> None:
    clock = Clock()
    torch.manual_seed(5)
    first, second = clock.draw("g"), clock.draw("g")
    torch.manual_seed(5)
    assert first != second
    assert (clock.draw("g"), clock.draw("g")) == (first, second)
