"""Tokens a second, put together from models of a few blocks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from deep import LAYERS, parts_and_data, parts_of
from torch.utils.flop_counter import FlopCounterMode

from lowrank import assemble
from lowrank.adapters.inject import named_trainable
from lowrank.keys import Clock
from lowrank.ledger import calibrate, measure
from lowrank.ledger.thin import kinds, thin
from lowrank.quant.nf4 import NF4Linear
from lowrank.train.loop import Loop

PLAIN = ("loop.fast=false",)  # what FlopCounterMode can see into


def flops(loop: Loop, batches: Any) -> float:
    with FlopCounterMode(display=False) as counted:
        assert measure.made(loop, batches)
    return float(counted.get_total_flops())


def whole(parts: Any, data: Any) -> Loop:
    return measure.loop_of(parts, data, assemble.skeleton(parts.config), range(LAYERS))


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("llama", ()),
        ("gpt2", ("adapter.targets=[c_attn]",)),
        ("llama", ("adapter.targets=[q_proj@4-5]",)),
        ("llama", ("adapter.targets={q_proj@1:{},v_proj@2-5:{r:4}}",)),
        ("llama", ("adapter=full",)),
        ("llama", ("adapter=full", "adapter.targets=['*norm*']")),
        ("llama", ("loop.gradient_checkpointing=block",)),
        ("llama", ("loop.accumulate=3",)),
        ("llama", ("quant=nf4",)),
    ],
    ids=["all", "gpt2", "top", "uneven", "full", "norms", "recomputed", "accumulated", "nf4"],
)
def test_the_cost_of_the_whole_is_the_sum_of_what_its_blocks_add(
    tmp_path: Path, kind: str, overrides: tuple[str, ...]
) -> None:
    parts, data = parts_and_data(tmp_path, *PLAIN, *overrides, kind=kind)
    loop = whole(parts, data)
    steps: Any = loop.batches
    mean = steps.at(0)
    exact = flops(loop, mean) / sum(batch.real_tokens for batch in mean)
    assert next(measure.rounds(parts, data, flops)) == pytest.approx(exact, rel=1e-9)


def test_blocks_are_told_apart_by_what_is_on_them_and_by_whether_a_gradient_reaches_them(tmp_path: Path) -> None:
    groups = {
        (): [[0, 1, 2, 3, 4, 5]],
        ("adapter.targets=[q_proj@4-5]",): [[0, 1, 2, 3], [4, 5]],
        ("adapter.targets=[q_proj@1,v_proj@4]",): [[0], [1, 2, 3, 4, 5]],  # too many kinds to measure each
        ("adapter=prefix", "adapter.length=2"): [[0, 1, 2, 3, 4, 5]],
        ("adapter.targets=[lm_head]",): [[0, 1, 2, 3, 4, 5]],
        ("adapter=full", "adapter.targets=[model.norm,'*.5.mlp*']"): [[0, 1, 2, 3, 4], [5]],
    }
    for overrides, expected in groups.items():
        parts = parts_of(tmp_path, *overrides)
        assert kinds(parts.plan, assemble.skeleton(parts.config)) == expected, overrides


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_thin_model_has_the_adapters_and_the_quantisation_of_the_blocks_it_keeps(tmp_path: Path, quant: str) -> None:
    more = ["quant.skip=[lm_head,'*.layers.5.*']"] if quant == "nf4" else []
    parts = parts_of(tmp_path, f"quant={quant}", "adapter.targets={q_proj@0-3:{},v_proj@4-5:{r:2}}", *more)
    made = thin(parts, assemble.skeleton(parts.config), [0, 5], Clock(0)).model
    shapes = {name: tuple(p.shape) for name, p in named_trainable(made).items()}
    assert shapes == {
        "model.layers.0.self_attn.q_proj.adapter.A": (16, 32),
        "model.layers.0.self_attn.q_proj.adapter.B": (32, 16),
        "model.layers.1.self_attn.v_proj.adapter.A": (2, 32),
        "model.layers.1.self_attn.v_proj.adapter.B": (16, 2),
    }
    four_bit = {name.split(".")[2] for name, m in made.named_modules() if isinstance(m, NF4Linear)}
    assert four_bit == ({"0"} if quant == "nf4" else set())


def test_calibrating_draws_nothing_from_torchs_generator(tmp_path: Path) -> None:
    parts, data = parts_and_data(tmp_path)
    before = torch.get_rng_state()
    calibrate.measured(parts, data, 0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_data_documents_are_of_the_longest_allowed(tmp_path: Path) -> None:
    loop = whole(parts_of(tmp_path, "data.max_length=40"), None)
    [batch] = loop.batches.at(1)
    assert batch.real_tokens == 2 * 40


@pytest.mark.usefixtures("cache")
def test_a_speed_is_kept_for_the_same_run_and_for_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, data = parts_and_data(tmp_path)
    assert calibrate.cached(parts, data) is None
    found = calibrate.calibrate(parts, data, seconds=0.1)
    assert calibrate.cached(parts, data) == found
    assert calibrate.calibrate(parts, data) == found
    longer = parts_of(tmp_path, "loop.steps=7", "optim.lr=1", "checkpoint.every=3")  # cost nothing a token
    assert calibrate.cached(longer, data) == found
    for other in ("loop.micro_batch=4", "adapter.r=2", "loop.fast=false", "optim=sgd", "adapter.targets=[q_proj]"):
        assert calibrate.cached(*parts_and_data(tmp_path, other)) is None, other
    monkeypatch.setattr(torch, "get_num_threads", lambda: 977)
    assert calibrate.cached(parts, data) is None


def test_it_takes_three_rounds_at_least_and_ends_in_time() -> None:
    assert not calibrate.enough([1.0, 1.0], 99, 10)
    assert calibrate.enough([1.0, 2.0, 3.0], 10, 10)
    assert not calibrate.enough([1.0, 2.0, 3.0] * 4, 9, 10)
    assert calibrate.enough([1.0, 1.001, 0.999] * 4, 1, 10)


def test_the_expected_speed_is_near_that_of_the_run_itself(tmp_path: Path) -> None:
    """Within a half, on a machine that may be busy: both are measured three times, in turns, and one pair suffices."""
    parts, data = parts_and_data(tmp_path)
    loop = whole(parts, data)
    steps: Any = loop.batches
    ratios = []
    for number in range(3):
        begun, tokens = time.perf_counter(), 0
        for step in range(8):
            batches = steps.order.at(8 * number + step + 1)
            measure.seconds(loop, batches)
            tokens += sum(batch.real_tokens for batch in batches)
        real = tokens / (time.perf_counter() - begun)
        ratios.append(calibrate.measured(parts, data, 1.0).tokens_per_s / real)
    assert min(abs(ratio - 1) for ratio in ratios) < 0.5, ratios


@pytest.mark.cuda
def test_on_cuda_it_is_near_that_of_the_run_itself(tmp_path: Path) -> None:
    parts, data = parts_and_data(tmp_path, "loop.device=cuda", "loop.precision=bf16")
    loop = whole(parts, data)
    steps: Any = loop.batches
    measure.seconds(loop, steps.at(1))
    rates = []
    for number in range(1, 9):
        batches = steps.order.at(number)
        rates.append(sum(batch.real_tokens for batch in batches) / measure.seconds(loop, batches))
    real = sorted(rates)[4]
    assert calibrate.measured(parts, data, 2.0).tokens_per_s == pytest.approx(real, rel=0.5)
