"""LoHa against its equation with both products built, and against PEFT's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from beside_peft import check_same_as_peft
from peft import LoHaConfig
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

from lowrank.adapters import LoHa
from lowrank.adapters.plan import plan
from lowrank.errors import ConfigError
from lowrank.models.tiny import tiny_llama


def test_output_and_every_gradient_are_the_equations(base: nn.Module) -> None:
    def equation(x: Tensor, W: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> Tensor:
        change = (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"])  # (out, in)
        return F.linear(x, W + 2.5 / 3 * change, b)

    wrapped = wrap(base, LoHa, r=3, alpha=2.5)
    check_equation(wrapped, equation)
    check_finite_differences(wrapped)
    check_merged(wrapped)
    check_factors(wrapped)


def test_it_starts_as_the_base_and_follows_autocast(base: nn.Module) -> None:
    check_starts_as_the_base(base, LoHa, r=3)
    check_autocast(base, LoHa, r=3)


def test_two_products_of_rank_r_have_rank_r_squared() -> None:
    wrapped = wrap(nn.Linear(16, 12), LoHa, r=3)
    weight = torch.zeros(12, 16, dtype=torch.float64)
    assert int(torch.linalg.matrix_rank(wrapped.adapter.merged(weight, None)[0])) == 9
    assert sum(p.numel() for p in wrapped.adapter.parameters()) == 2 * 3 * (16 + 12)


def test_the_first_update_is_about_as_large_as_loras() -> None:
    """One step of the optimizer's size in B2 moves W's entries by about a tenth of it, as LoRA's first step does."""
    adapter = start(nn.Linear(576, 576), LoHa).adapter
    adapter.get_parameter("B2").data.fill_(1.0)
    change = adapter.merged(torch.zeros(576, 576), None)[0]
    assert 0.03 < float(change.detach().std()) < 0.3


def test_nothing_of_the_weights_size_is_kept_for_backward() -> None:
    wrapped = start(nn.Linear(64, 48).requires_grad_(False), LoHa, r=2)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(3, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        wrapped(x)
    assert kept
    assert max(kept) <= 4 * 64  # A, of r² rows


def test_logits_loss_and_gradients_are_those_of_peft() -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    # PEFT rounds alpha / r to fp32: one that is exact there
    rules: Any = dict.fromkeys(targets, partial(LoHa, r=4, alpha=5.0))
    config = LoHaConfig(r=4, alpha=5.0, target_modules=targets)

    def values(layer: Any) -> dict[str, Tensor]:
        names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
        return {name: getattr(layer, its)["default"] for name, its in names.items()}

    check_same_as_peft(tiny_llama, rules, config, values)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": 0}, "adapter.r: 0 is not allowed; a positive integer."),
        ({"alpha": -1}, "adapter.alpha: -1 is not allowed; a positive number."),
    ],
)
def test_options_out_of_range_are_refused(options: Any, sentence: str, llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(llama, {"q_proj": partial(LoHa, **options)})
    assert str(refused.value) == sentence
