"""Which jobs of a sweep may train in one pass, told from their configurations alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lowrank.compose import compose
from lowrank.sweep.compatible import together_key, why_alone


def key(*overrides: str) -> str | None:
    return together_key(compose(["model=tiny_llama", *overrides]).to_dict())


@pytest.mark.parametrize(
    "changed",
    [
        ["adapter.r=64", "adapter.alpha=1", "adapter.targets=[q_proj]", "adapter.dropout=0.1"],
        ["optim.lr=1e-5", "loop.seed=9", "schedule=cosine", "loop.steps=7", "loop.accumulate=4", "loop.micro_batch=1"],
        ["adapter.init=orthogonal", "adapter.rslora=true", "data.limit=10"],
        ["adapter=adalora"],
    ],
)
def test_what_is_a_runs_own_may_differ(changed: list[str]) -> None:
    assert key(*changed) == key() is not None


@pytest.mark.parametrize(
    "changed",
    [["model=tiny_gpt2"], ["quant=nf4"], ["loop.precision=bf16"], ["loop.fast=false"], ["adapter=dora"]],
)
def test_what_all_compute_alike_may_not(changed: list[str]) -> None:
    """DoRA could: it would keep LoRA's blocks from the fast path."""
    assert None is not key(*changed) != key()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (["adapter=full"], "Full trains the base"),
        (["adapter=prefix"], "Prefix"),
        (["adapter=bottleneck"], "Bottleneck"),
        (["adapter.init=pissa"], "init=pissa changes the base"),
        (["adapter.targets={q_proj:{init:loftq}}", "quant=nf4"], "init=loftq"),
        (["optim.in_backward=true", "loop.max_grad_norm=.inf"], "in_backward"),
        (["loop.profile=2"], "loop.profile=2"),
    ],
)
def test_what_trains_alone_is_told_why(changed: list[str], reason: str) -> None:
    tree = compose(["model=tiny_llama", *changed]).to_dict()
    assert together_key(tree) is None
    assert reason in str(why_alone(tree))


def test_asking_needs_no_torch() -> None:
    code = "import sys, lowrank.sweep.compatible; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
