"""LoKr against its equation with the Kronecker product built, and against PEFT's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from beside_peft import check_same_as_peft
from peft import LoKrConfig
from peft.tuners.lokr.layer import factorization
from sited import (
    check_autocast,
    check_equation,
    check_factors,
    check_finite_differences,
    check_merged,
    check_starts_as_the_base,
    start,
    wrap,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowrank.adapters import LoKr
from lowrank.adapters.methods.lokr import divided
from lowrank.adapters.plan import plan
from lowrank.errors import ConfigError
from lowrank.models.tiny import tiny_llama

# Of a layer of 16 inputs and 12 outputs: D (6, 8) as one matrix, D (6, 8) of rank 2, D (4, 4), D (12, 16) of rank 3.
KINDS = pytest.mark.parametrize(
    "options",
    [{"r": 8, "factor": 2}, {"r": 2, "factor": 2}, {"r": 8}, {"r": 3, "factor": 1}],
    ids=["whole", "low rank", "square", "plain low rank"],
)


def equation(scale: float, x: Tensor, W: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> Tensor:
    D = p["D"] if "D" in p else p["B"] @ p["A"]
    return F.linear(x, W + scale * torch.kron(p["C"], D), b)


@KINDS
def test_output_and_every_gradient_are_the_equations(base: nn.Module, options: dict[str, int]) -> None:
    wrapped = wrap(base, LoKr, alpha=2.5, **options)
    check_equation(wrapped, partial(equation, 2.5 / options["r"]))
    check_finite_differences(wrapped)
    check_merged(wrapped)
    check_factors(wrapped)


@KINDS
def test_it_starts_as_the_base_and_follows_autocast(base: nn.Module, options: dict[str, int]) -> None:
    check_starts_as_the_base(base, LoKr, **options)
    check_autocast(base, LoKr, **options)


def test_the_factors_sizes_are_lycoris() -> None:
    for size in (*range(1, 200), 576, 1536, 4096, 49152):
        for factor in (None, 1, 2, 3, 4, 6, 8, 16, 30):
            assert divided(size, factor) == factorization(size, -1 if factor is None else factor)


def test_shapes_and_counts() -> None:
    shapes = {name: tuple(p.shape) for name, p in start(nn.Linear(1536, 576), LoKr).adapter.named_parameters()}
    assert shapes == {"C": (24, 32), "A": (8, 48), "B": (24, 8)}
    shapes = {name: tuple(p.shape) for name, p in start(nn.Linear(1536, 576), LoKr, r=24).adapter.named_parameters()}
    assert shapes == {"C": (24, 32), "D": (24, 48)}


@pytest.mark.parametrize(("r", "factor"), [(2, -1), (8, -1), (3, 4), (40, 2)])
def test_logits_loss_and_gradients_are_those_of_peft(r: int, factor: int) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    mine = partial(LoKr, r=r, alpha=5.0, factor=None if factor == -1 else factor)
    rules: Any = dict.fromkeys(targets, mine)
    config = LoKrConfig(r=r, alpha=5.0, decompose_factor=factor, target_modules=targets)

    def values(layer: Any) -> dict[str, Tensor]:
        names = {"C": "lokr_w1", "D": "lokr_w2", "B": "lokr_w2_a", "A": "lokr_w2_b"}
        found = {name: getattr(layer, its) for name, its in names.items()}
        return {name: held["default"] for name, held in found.items() if "default" in held}

    check_same_as_peft(tiny_llama, rules, config, values)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": 0}, "adapter.r: 0 is not allowed; a positive integer."),
        ({"alpha": 0}, "adapter.alpha: 0 is not allowed; a positive number."),
        ({"factor": 0}, "adapter.factor: 0 is not allowed; a positive integer."),
        ({"factor": 2.0}, "adapter.factor: 2.0 is not allowed; a positive integer."),
    ],
)
def test_options_out_of_range_are_refused(options: Any, sentence: str, llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(llama, {"q_proj": partial(LoKr, **options)})
    assert str(refused.value) == sentence
