"""What the tests of merging share: a model whose adapters have moved, and its logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters import LoRA
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import Rules, plan
from lowrank.keys import key

RULES: Rules = {"all-linear": partial(LoRA, r=2), "embedding": partial(LoRA, r=3)}
Q = "model.layers.0.self_attn.q_proj"


def trained(model: Any, rules: Rules = RULES, size: float = 0.1) -> Any:
    """``model`` with adapters that have moved: ``size`` · normal numbers, keyed by name."""
    apply(model, plan(model, rules))
    for name, parameter in named_trainable(model).items():
        parameter.data.normal_(0, size, generator=key(1, name))
    return model


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits
    return found
