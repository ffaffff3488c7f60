"""Dropped positions: an exact Bernoulli draw that one seed repeats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowrank.adapters.methods.dropout import Entries, Mask, Positions, drop, dropped_positions

CPU = torch.device("cpu")


def dropped(n: int, p: float, draws: int) -> Tensor:
    """(draws, n) whether each entry was dropped, for one seed after the other."""
    hits = torch.zeros(draws, n)
    for seed in range(draws):
        hits[seed, dropped_positions(n, p, seed, CPU)] = 1
    return hits


def test_positions_ascend_and_lie_within_and_a_seed_repeats_them() -> None:
    for n, p in [(0, 0.5), (1, 0.5), (7, 0.01), (1000, 0.1), (1000, 0.9)]:
        positions = dropped_positions(n, p, 11, CPU)
        assert torch.equal(positions, dropped_positions(n, p, 11, CPU))
        assert (positions.diff() > 0).all()
        assert ((positions >= 0) & (positions < n)).all()


def test_another_seed_draws_another_mask() -> None:
    assert not torch.equal(dropped_positions(1000, 0.1, 1, CPU), dropped_positions(1000, 0.1, 2, CPU))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_every_entry_drops_with_probability_p_first_and_last_included(p: float) -> None:
    n, draws = 60, 3000
    rate = dropped(n, p, draws).mean(0)  # (n,)
    deviation = (rate - p) / math.sqrt(p * (1 - p) / draws)
    assert deviation.abs().max() < 4.5  # of 60 standard normal draws
    assert 0.5 < deviation.square().mean() < 1.6  # χ²/n


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_entries_drop_independently_of_their_neighbours_and_the_count_is_binomial(p: float) -> None:
    n, draws = 60, 3000
    hits = dropped(n, p, draws)
    both = (hits[:, 1:] * hits[:, :-1]).mean()
    assert abs(float(both) - p * p) < 4.5 * p / math.sqrt(n * draws) + 0.002
    counts = hits.sum(1)
    expected = n * p * (1 - p)
    assert abs(float(counts.var()) / expected - 1) < 0.12


def test_what_is_left_is_scaled_so_that_the_mean_stays() -> None:
    x = torch.rand(50, 40, dtype=torch.float64) + 0.5
    out = drop(x, 0.25, 3)
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    gone = torch.ones(x.numel(), dtype=torch.bool).index_fill(0, dropped_positions(x.numel(), 0.25, 3, CPU), False)
    assert torch.equal(kept, gone.view(x.shape))


def test_dropping_leaves_its_input_alone() -> None:
    x = torch.ones(10, 10)
    drop(x, 0.5, 0)
    assert torch.equal(x, torch.ones(10, 10))


def test_the_mask_goes_by_logical_place_whatever_the_strides() -> None:
    x = torch.rand(12, 8)
    assert torch.equal(drop(x.T.contiguous().T, 0.5, 4), drop(x, 0.5, 4))


def test_a_dtype_does_not_move_the_mask() -> None:
    x = torch.ones(30, 30)
    masks = [drop(x.to(dtype), 0.4, 9) == 0 for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def masks(x: Tensor) -> list[Mask]:
    """Both kinds, whatever the device: by position, and entry by entry as CUDA draws them."""
    return [Positions(dropped_positions(x.numel(), 0.3, 5, CPU)), Entries.draw(x.numel(), 0.3, 5, CPU)]


@pytest.mark.parametrize("kind", [0, 1], ids=["positions", "entries"])
def test_a_mask_hides_what_it_drops_for_a_while_and_keeps_writes_out_of_it(kind: int) -> None:
    x = torch.rand(30, 20, dtype=torch.float64) + 1
    mask, before, version = masks(x)[kind], x.clone(), x._version
    gone = mask.zero_(x.clone()) == 0
    assert 0.2 < float(gone.double().mean()) < 0.4
    with mask.zeroed(x) as z:
        assert torch.equal(z, torch.where(gone, 0.0, before))
    assert torch.equal(x, before)
    assert x._version == version  # so that what autograd has kept of it is still good
    with mask.outside(x):
        x.add_(2)
    assert torch.equal(x, torch.where(gone, before, before + 2))


def test_what_is_hidden_comes_back_though_its_reader_fails() -> None:
    x = torch.ones(30, 20)
    with pytest.raises(MemoryError), masks(x)[0].zeroed(x):
        raise MemoryError
    assert torch.equal(x, torch.ones(30, 20))


def test_entries_are_drawn_again_from_their_seed() -> None:
    one, again, other = (Entries.draw(5000, 0.05, seed, CPU).dropped for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert abs(float(one.double().mean()) - 0.05) < 4.5 * math.sqrt(0.05 * 0.95 / 5000)


@pytest.mark.cuda
def test_on_cuda_masks_repeat_and_drop_with_probability_p() -> None:
    x = torch.ones(1000, 1000, device="cuda")
    one, again = drop(x, 0.05, 3), drop(x, 0.05, 3)
    assert torch.equal(one, again)
    assert abs(float((one == 0).double().mean()) - 0.05) < 0.001
