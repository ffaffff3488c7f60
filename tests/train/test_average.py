"""The running average of the weights: the sum it is said to be, away when training goes on, exact on resume."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from loops import loop_of, same, values
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowrank.train.average import Average
from lowrank.train.checkpoint import Saved, read, save
from lowrank.train.hooks import Hook, join, split
from lowrank.train.loop import Loop

DECAY = 0.8


class Remembers(Hook):
    """Every step's weights, and before them those of the start."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.seen = loop, [values(loop)]

    def after_update(self, step: int) -> None:
        self.seen.append(values(self.loop))


def averaged(model: LlamaForCausalLM, steps: int) -> tuple[Loop, Average, list[dict[str, Tensor]]]:
    loop = loop_of(model, dropout=0.1)
    average, weights = Average(loop.parameters, DECAY), Remembers(loop)
    loop.hooks = [average, weights]
    loop.run(steps)
    return loop, average, weights.seen


def test_it_is_the_weighted_mean_of_the_weights_after_each_update(llama: LlamaForCausalLM) -> None:
    _, average, seen = averaged(llama, 6)
    factors = [DECAY ** (6 - k) for k in range(1, 7)]
    for name, mean in average.average.items():
        expected = sum(f * seen[k][name].double() for k, f in enumerate(factors, start=1)) / sum(factors)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_first_average_is_the_first_weights_and_nothing_of_those_before(llama: LlamaForCausalLM) -> None:
    _, average, seen = averaged(llama, 1)
    assert same(average.average, seen[1])
    assert not same(seen[0], seen[1])


def test_training_does_not_see_it_though_it_is_used_between_steps(llama: LlamaForCausalLM) -> None:
    plain = loop_of(copy.deepcopy(llama), dropout=0.1)
    plain.run(5)
    loop = loop_of(copy.deepcopy(llama), dropout=0.1)
    average = Average(loop.parameters, DECAY)
    loop.hooks = [average]
    for step in range(1, 6):
        loop.run(step)
        with average.used():
            assert same(values(loop), average.average)
    assert same(values(plain), values(loop))


def test_the_weights_come_back_whatever_happens_inside(llama: LlamaForCausalLM) -> None:
    loop, average, _ = averaged(llama, 3)
    before = values(loop)
    inside: list[dict[str, Tensor]] = []

    def interrupted() -> None:
        with average.used():
            inside.append(values(loop))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert same(values(loop), before)
    assert not same(inside[0], before)
    average.take()
    assert same(values(loop), average.average)


def test_an_entry_that_a_method_sets_to_zero_is_zero_in_the_average() -> None:
    parameter = nn.Parameter(torch.ones(3))
    average = Average({"E": parameter}, 0.9)
    average.after_update(1)
    with torch.no_grad():
        parameter[1] = 0.0
    average.after_update(2)
    assert average.average["E"].tolist() == [1.0, 0.0, 1.0]


def test_weights_in_half_precision_are_averaged_in_fp32() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    average = Average({"w": parameter}, 0.999)
    average.after_update(1)
    with torch.no_grad():
        parameter.fill_(1 + 2**-7)  # the next number in bf16: the mean of the two lies between
    average.after_update(2)
    assert 1 < float(average.average["w"]) < 1 + 2**-7
    with average.used():
        assert parameter.dtype == torch.bfloat16


def test_it_goes_on_bit_for_bit_from_a_checkpoint(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    loop, average, _ = averaged(llama, 3)
    tensors, kept = split({"early": {"best": None}, "average": average.state_dict()})
    path = save(tmp_path, 3, Saved({"adapter": dict(loop.parameters), "hooks": tensors}, {"hooks": kept}))
    saved = read(path)
    resumed = Average(loop.parameters, DECAY)
    resumed.load_state_dict(join(saved.tensors["hooks"], saved.state["hooks"])["average"])
    loop.hooks = [average, resumed]
    loop.run(6)
    assert same(average.average, resumed.average)
