"""A loss that stands out is flagged, and ordinary noise is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loops import loop_of
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowrank.keys import key
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.loss import target_loss
from lowrank.train.spikes import FEW, WINDOW, spike


def noisy(n: int, around: float = 2.0, deviation: float = 0.1) -> list[float]:
    return (around + deviation * torch.randn(n, generator=key(0, "losses"))).tolist()


def test_the_first_few_steps_are_never_spikes() -> None:
    assert not any(spike(noisy(n), 1e9) for n in range(FEW))
    assert spike(noisy(FEW), 1e9)


def test_normal_noise_and_a_falling_loss_are_no_spikes() -> None:
    losses = noisy(4000)
    assert not any(spike(losses[max(0, i - WINDOW) : i], losses[i]) for i in range(len(losses)))
    falling = [4 * math.exp(-i / 50) + noise for i, noise in enumerate(noisy(300, 1.0, 0.05))]
    assert not any(spike(falling[max(0, i - WINDOW) : i], falling[i]) for i in range(len(falling)))


@pytest.mark.parametrize("earlier", [0, 1, 5])
def test_a_spike_is_seen_although_others_are_among_the_losses_before_it(earlier: int) -> None:
    losses = noisy(WINDOW)
    losses[3 : 3 + earlier] = [50.0] * earlier
    assert spike(losses, 3.5)
    assert not spike(losses, 2.2)
    assert not spike(losses, 0.1)


def test_a_new_level_ceases_to_be_one() -> None:
    losses = [*noisy(WINDOW), *noisy(WINDOW, around=6.0)]
    flagged = [spike(losses[i - WINDOW : i], losses[i]) for i in range(WINDOW, len(losses))]
    assert flagged[0]
    assert not flagged[-1]


def test_a_loss_that_hardly_moves_may_move_a_little() -> None:
    assert not spike([2.0] * WINDOW, 2.1)
    assert spike([2.0] * WINDOW, 2.3)
    assert not spike([0.0] * WINDOW, 0.0)


def test_the_loop_marks_it_and_its_state_holds_the_last_losses(llama: LlamaForCausalLM) -> None:
    records: list[StepRecord] = []

    class Keeps(Hook):
        def after_step(self, record: StepRecord) -> None:
            records.append(record)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return target_loss(model, batch) * (5 if loop.state.step == WINDOW + 4 else 1)

    loop = loop_of(llama, loss=loss, hooks=[Keeps()], schedule=lambda step: 1e-3)
    loop.run(WINDOW + 6)
    assert [record.spike for record in records] == [*[False] * (WINDOW + 4), True, False]
    assert loop.state.recent == [record.loss for record in records][-WINDOW:]
