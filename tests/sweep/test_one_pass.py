"""Each of several runs in one pass computes what it computes alone, in fp64, and none of them sees another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from abreast import Run, alone, bases, furthest, in_one_pass, moved, poisoned, run_of

from lowrank.adapters.together import Bundle, Slices
from lowrank.errors import ConfigError
from lowrank.quant.nf4 import NF4Linear
from lowrank.train.finite import NotFinite

pytestmark = pytest.mark.usefixtures("cache")
NEAR = 1e-6
# What jobs of one sweep differ in: rank, alpha, targets, method, start, learning rate, seed, batches, length.
JOBS: dict[str, list[str]] = {
    "small": ["adapter.r=2"],
    "large": ["adapter.r=16", "adapter.alpha=64", "optim.lr=1e-3", "loop.seed=5"],
    "attention": ["adapter.targets=[q_proj,v_proj]", "loop.steps=3", "loop.micro_batch=5"],
    "accumulated": ["loop.accumulate=3", "adapter.init=orthogonal", "loop.seed=1"],
    "dropped": ["adapter.dropout=0.3", "loop.seed=2", "optim=sgd", "optim.lr=1e-2"],
    "frozen": ["adapter.freeze_a=true", "loop.max_grad_norm=0.1", "schedule=cosine"],
}
KINDS: dict[str, list[str]] = {
    "adalora": ["adapter=adalora", "adapter.dropout=0.2"],
    "dora": ["adapter=dora", "adapter.dropout=0.2", "adapter.targets=[q_proj,down_proj]"],
    "oft": ["adapter=oft"],
    "vera": ["adapter=vera", "loop.seed=3"],
    "ends": ["adapter.targets=[embed_tokens,lm_head,up_proj]", "loop.steps=4"],
}


def both(rows: Path, jobs: dict[str, list[str]], *common: str) -> None:
    base, shared = bases(rows, *common)
    solo, joint = ([run_of(base, [*shared, *job]) for job in jobs.values()] for _ in range(2))
    start = [run.weights for run in solo]
    alone(solo)
    assert [one.error for one in in_one_pass(base, joint)] == [None] * len(jobs)
    for name, run, one, first in zip(jobs, joint, solo, start, strict=True):
        assert moved(one, first) > 1e-4, name
        assert furthest(run, one) <= NEAR, name
        assert run.loop.state.data_order == one.loop.state.data_order


@pytest.mark.parametrize("fast", ["true", "false"])
def test_each_run_equals_the_one_that_trains_alone(rows: Path, fast: str) -> None:
    both(rows, JOBS, f"loop.fast={fast}")


def test_runs_of_different_methods_and_sites_go_together(rows: Path) -> None:
    """On the plain path, in which the model's own norms round to fp32: a run that alone goes by the fast one differs by
    that."""
    both(rows, {**KINDS, "small": JOBS["small"]}, "loop.fast=false")


@pytest.mark.parametrize("mode", ["selective", "block"])
def test_and_so_they_do_where_blocks_are_recomputed(rows: Path, mode: str) -> None:
    both(rows, {name: JOBS[name] for name in ("small", "dropped", "attention")}, f"loop.gradient_checkpointing={mode}")


def test_a_run_leaves_when_it_has_made_its_steps_and_the_others_go_on(rows: Path) -> None:
    base, shared = bases(rows)
    runs = [run_of(base, [*shared, f"loop.steps={steps}"]) for steps in (4, 2, 3)]
    assert [one.number for one in in_one_pass(base, runs)] == [1, 2, 0]
    assert [run.loop.state.step for run in runs] == [4, 2, 3]


@pytest.mark.parametrize("fast", ["true", "false"])
def test_a_run_that_is_not_finite_ends_alone(rows: Path, fast: str) -> None:
    base, shared = bases(rows, f"loop.fast={fast}")
    jobs = [[*shared, f"loop.seed={seed}"] for seed in range(3)]
    runs, without = ([run_of(base, job) for job in jobs] for _ in range(2))
    poisoned(runs[1], 3)
    left = in_one_pass(base, runs)
    assert [one.number for one in left if one.error] == [1]
    assert isinstance(left[0].error, NotFinite)
    assert left[0].error.fault.step == 3
    assert len(in_one_pass(base, [without[0], without[2]])) == 2
    assert all(furthest(runs[n], without[n]) <= NEAR for n in (0, 2))


def test_a_run_whose_step_is_passed_over_makes_it_again_and_no_other_waits(rows: Path) -> None:
    base, shared = bases(rows, "loop.on_nonfinite=skip")
    solo, joint = ([run_of(base, [*shared, f"loop.seed={seed}"]) for seed in range(2)] for _ in range(2))
    for runs in (solo, joint):
        bad = runs[1].loop.batches.at(2)[0]
        spoil(runs[1], bad.rows)
    alone(solo)
    in_one_pass(base, joint)
    assert [run.loop.state.skipped for run in joint] == [0, 1]
    assert all(furthest(*pair) <= NEAR for pair in zip(joint, solo, strict=True))


def spoil(run: Run, rows: tuple[int, ...]) -> None:
    """The run's penalty is NaN while a batch of these rows is the next one."""
    loop = run.loop
    loop.penalty = lambda: math.nan if loop.batches.at(loop.state.position + 1)[0].rows == rows else 0.0


def test_an_adapter_that_raises_ends_its_own_run(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, shared = bases(rows, "loop.fast=false", "loop.steps=3")
    jobs = [[*shared, "adapter=dora"], [*shared, "adapter=oft"]]
    runs, solo = ([run_of(base, job) for job in jobs] for _ in range(2))
    alone(solo[:1])

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("in the middle of a user's forward")

    for module in runs[1].loop.model.modules():
        if type(module).__name__ == "OFT":
            monkeypatch.setattr(module, "forward", broken)
    said: list[str] = []
    left = in_one_pass(base, runs, said)
    assert {one.number: type(one.error) for one in left} == {0: type(None), 1: ZeroDivisionError}
    assert ["one by one" in line for line in said] == [True]
    assert furthest(runs[0], solo[0]) <= NEAR


def test_a_weight_of_the_base_is_dequantised_as_often_as_for_one_run(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, shared = bases(rows, "quant=nf4")
    calls: list[int] = []
    plain = NF4Linear.dequantize

    def counted(self: Any, *args: Any) -> Any:
        calls.append(id(self.packed))
        return plain(self, *args)

    monkeypatch.setattr(NF4Linear, "dequantize", counted)

    def dequantised(count: int) -> int:
        runs = [run_of(base, [*shared, "loop.steps=1", f"loop.seed={seed}"]) for seed in range(count)]
        calls.clear()
        in_one_pass(base, runs)
        return len(calls)

    assert 0 < dequantised(1) == dequantised(4)


def test_a_layer_that_is_given_other_rows_says_so(rows: Path) -> None:
    slices = Slices()
    slices.set([0, 4], [3, 5], [1, 2])
    assert slices.of(8) == {0: slice(0, 3), 4: slice(3, 8)}
    assert slices.of(3) == {0: slice(0, 1), 4: slice(1, 3)}
    with pytest.raises(ConfigError, match=r"sweep\.together=1"):
        slices.of(7)
    assert Bundle(slices).at_work() == []
