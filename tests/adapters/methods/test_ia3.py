"""(IA)³ against its equation, and against PEFT's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch.nn.functional as F
from beside_peft import check_same_as_peft
from peft import IA3Config
from sited import (
    check_autocast,
    check_equation,
    check_finite_differences,
    check_merged,
    check_starts_as_the_base,
    start,
    wrap,
)
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from lowrank.adapters import IA3
from lowrank.adapters.plan import plan
from lowrank.errors import ConfigError
from lowrank.models.tiny import tiny_gpt2, tiny_llama

BOTH = pytest.mark.parametrize("feedforward", [False, True], ids=["outputs", "inputs"])


def outputs(x: Tensor, W: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> Tensor:
    return p["scale"] * F.linear(x, W, b)


def inputs(x: Tensor, W: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> Tensor:
    return F.linear(x * p["scale"], W, b)


@BOTH
def test_output_and_every_gradient_are_the_equations(base: nn.Module, feedforward: bool) -> None:
    wrapped = wrap(base, IA3, feedforward=feedforward)
    check_equation(wrapped, inputs if feedforward else outputs)
    check_finite_differences(wrapped)
    check_merged(wrapped)


@BOTH
def test_it_starts_as_the_base_and_follows_autocast(base: nn.Module, feedforward: bool) -> None:
    check_starts_as_the_base(base, IA3, feedforward=feedforward)
    check_autocast(base, IA3, feedforward=feedforward)


def test_a_vector_of_the_outputs_or_of_the_inputs() -> None:
    layer = nn.Linear(16, 12)
    assert start(layer, IA3).adapter.scale.shape == (12,)
    assert start(layer, IA3, feedforward=True).adapter.scale.shape == (16,)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_loss_and_gradients_are_those_of_peft(kind: str) -> None:
    build, outside, inside = {
        "llama": (tiny_llama, ["k_proj", "v_proj"], "down_proj"),
        "gpt2": (tiny_gpt2, ["c_attn"], "mlp.c_proj"),
    }[kind]
    rules: Any = dict.fromkeys(outside, IA3) | {f"*.{inside}": partial(IA3, feedforward=True)}
    config = IA3Config(target_modules=[*outside, inside], feedforward_modules=[inside])
    check_same_as_peft(build, rules, config, lambda layer: {"scale": layer.ia3_l["default"]})


def test_embeddings_are_refused_with_the_sites_that_it_takes(gpt2: GPT2LMHeadModel) -> None:
    with pytest.raises(ConfigError, match=r"'wte' matches transformer.wte \(Embedding\), but IA3 adapts linear sites"):
        plan(gpt2, {"wte": IA3})


def test_a_flag_is_a_flag(gpt2: GPT2LMHeadModel) -> None:
    options: Any = {"feedforward": 1}
    with pytest.raises(ConfigError, match=r"adapter\.feedforward: 1 is not allowed; true or false\."):
        plan(gpt2, {"c_attn": partial(IA3, **options)})
