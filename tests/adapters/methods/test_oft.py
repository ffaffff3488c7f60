"""OFT against its equation, for what is orthogonal about it, and against PEFT's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from beside_peft import check_same_as_peft
from peft import OFTConfig
from sited import (
    check_autocast,
    check_equation,
    check_finite_differences,
    check_merged,
    check_starts_as_the_base,
    wrap,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowrank.adapters import OFT, Adapter
from lowrank.adapters.plan import plan
from lowrank.errors import ConfigError
from lowrank.models.tiny import tiny_llama


def skew(entries: Tensor, size: int) -> Tensor:
    """Row by row above the diagonal, and the negative below it."""
    Q = torch.zeros(size, size, dtype=entries.dtype)
    places = [(i, j) for i in range(size) for j in range(i + 1, size)]
    for (i, j), entry in zip(places, entries, strict=True):
        unit = torch.zeros_like(Q)
        unit[i, j], unit[j, i] = 1.0, -1.0
        Q = Q + entry * unit
    return Q


def equation(size: int, x: Tensor, W: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> Tensor:
    one = torch.eye(size, dtype=torch.float64)
    blocks = [(one - Q) @ torch.linalg.inv(one + Q) for Q in (skew(entries, size) for entries in p["R"])]
    return F.linear(x @ torch.block_diag(*blocks), W, b)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_output_and_every_gradient_are_the_equations(base: nn.Module, size: int) -> None:
    wrapped = wrap(base, OFT, block_size=size)
    check_equation(wrapped, partial(equation, size))
    check_finite_differences(wrapped)
    check_merged(wrapped)


@pytest.mark.parametrize("neumann", [0, 5])
def test_it_starts_as_the_base_and_follows_autocast(base: nn.Module, neumann: int) -> None:
    check_starts_as_the_base(base, OFT, block_size=4, neumann=neumann)
    check_autocast(base, OFT, block_size=4, neumann=neumann)


def blocks_of(adapter: Adapter) -> Tensor:
    assert isinstance(adapter, OFT)
    return adapter.rotation().detach()


def test_the_input_keeps_its_length_and_the_neurons_their_angles() -> None:
    layer = nn.Linear(16, 12, bias=False).double()
    wrapped = wrap(layer, OFT, block_size=4)
    blocks = blocks_of(wrapped.adapter)
    one = torch.eye(4, dtype=torch.float64).expand(4, 4, 4)
    torch.testing.assert_close(blocks @ blocks.mT, one, rtol=0, atol=1e-13)
    assert float((blocks - one).abs().max()) > 0.1
    merged, _ = wrapped.adapter.merged(layer.weight, None)
    torch.testing.assert_close(merged @ merged.T, layer.weight @ layer.weight.T, rtol=0, atol=1e-12)


def test_the_series_comes_as_near_to_a_rotation_as_it_has_terms() -> None:
    def error(terms: int) -> float:
        adapter = wrap(nn.Linear(16, 12), OFT, block_size=4, neumann=terms).adapter
        adapter.get_parameter("R").data.mul_(0.1)
        blocks = blocks_of(adapter)
        return float((blocks @ blocks.mT - torch.eye(4, dtype=torch.float64)).abs().max())

    errors = [error(terms) for terms in (5, 9, 17)]
    assert errors[0] > 1e-5 > 1e-8 > errors[1] > 1e-13 > errors[2]
    wrapped = wrap(nn.Linear(16, 12), OFT, block_size=4, neumann=5)
    check_finite_differences(wrapped)
    check_merged(wrapped)


@pytest.mark.parametrize("neumann", [0, 4, 5, 7])
def test_logits_loss_and_gradients_are_those_of_peft(neumann: int) -> None:
    targets = ["q_proj", "down_proj"]
    rules: Any = dict.fromkeys(targets, partial(OFT, block_size=8, neumann=neumann))
    series = {"use_cayley_neumann": bool(neumann), "num_cayley_neumann_terms": neumann or 5}
    config = OFTConfig(oft_block_size=8, target_modules=targets, **series)
    check_same_as_peft(tiny_llama, rules, config, lambda layer: {"R": layer.oft_R["default"].weight})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"block_size": 1}, "adapter.block_size: 1 is not allowed; an integer, 2 or more."),
        (
            {"block_size": 24},
            "adapter.block_size: 24 is not allowed on a site of 32 inputs; a divisor of that, such as 16.",
        ),
        ({"neumann": 3}, "adapter.neumann: 3 is not allowed; 0 (exact), or a number of terms, 4 to 1000."),
    ],
)
def test_options_out_of_range_are_refused(options: Any, sentence: str, llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(llama, {"q_proj": partial(OFT, **options)})
    assert str(refused.value) == sentence
