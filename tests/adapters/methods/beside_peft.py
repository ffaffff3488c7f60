"""A model with our adapters beside the same one with PEFT's, both in fp64 and with the same values."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

from lowrank.adapters.inject import apply
from lowrank.adapters.plan import Rules, plan
from lowrank.adapters.sites import adapted
from lowrank.keys import key

IDS = torch.randint(0, 256, (2, 16), generator=key(0, "ids"))


def check_same_as_peft(
    build: Callable[[], nn.Module], rules: Rules, config: PeftConfig, values: Callable[[Any], dict[str, Tensor]]
) -> None:
    """The same logits, loss and gradients. ``values`` of a layer of PEFT's: its parameters by our names, each of our
    number of values in our order."""
    base: Any = build().double()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    theirs = peft_of(copy.deepcopy(base), config).double().train()
    ours = apply(base, plan(base, rules)).double().train()
    pairs = []
    for path, site in adapted(ours):
        its = values(theirs.base_model.model.get_submodule(path))
        mine = dict(site.adapter.named_parameters())
        assert its.keys() == mine.keys()
        for name, parameter in mine.items():
            drawn = 0.2 * torch.randn(parameter.shape, generator=key(0, path, name), dtype=torch.float64)
            with torch.no_grad():
                parameter.add_(drawn)
                its[name].copy_(parameter.view_as(its[name]))
            pairs.append((parameter, its[name]))
    assert sum(p.requires_grad for p in theirs.parameters()) == len(pairs)
    one, other = ours(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    assert (one.logits - other.logits).abs().max() <= 1e-11
    assert (one.loss - other.loss).abs() <= 1e-12
    one.loss.backward()
    other.loss.backward()
    for parameter, its_parameter in pairs:
        assert parameter.grad is not None
        assert its_parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        assert (parameter.grad - its_parameter.grad.view_as(parameter)).abs().max() <= 1e-11


def peft_of(base: Any, config: PeftConfig) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # peft asks for it
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        return get_peft_model(base, config)
