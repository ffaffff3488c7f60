"""Small models with adapters that do something, and PEFT's view of the same base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.adapters import LoRA
from lowrank.adapters.inject import apply
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import adapted
from lowrank.keys import key
from lowrank.models.tiny import tiny_gpt2, tiny_llama

IDS = torch.randint(0, 256, (2, 12), generator=key(0, "ids"))


def base(kind: str, dtype: torch.dtype = torch.float32, **changed: Any) -> nn.Module:
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind]()
    if changed.get("untied"):
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    return model.to(dtype).eval().requires_grad_(False)


def with_lora(model: nn.Module, rules: Mapping[str, dict[str, Any]]) -> nn.Module:
    """A copy of ``model`` with LoRA on it whose B is drawn too, so that it changes every logit."""
    model = copy.deepcopy(model)
    apply(model, plan(model, {pattern: partial(LoRA, **options) for pattern, options in rules.items()}))
    model.to(next(model.parameters()).dtype)
    for path, module in adapted(model):
        draw(module.adapter.B, path)
    return model.eval()


@torch.no_grad()
def draw(parameter: Tensor, name: str) -> None:
    values = torch.randn(parameter.shape, generator=key(0, "drawn", name), dtype=torch.float64)
    parameter.copy_(0.1 * values)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture
def make_base() -> Callable[..., nn.Module]:
    return base


@pytest.fixture
def lora_on() -> Callable[[nn.Module, Mapping[str, dict[str, Any]]], nn.Module]:
    return with_lora


@pytest.fixture
def logits_of() -> Callable[[nn.Module], Tensor]:
    return logits
