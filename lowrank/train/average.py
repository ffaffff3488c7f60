"""A running average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.train.hooks import Hook


class Average(Hook):
    """θ̄ₜ = Σₖ βᵗ⁻ᵏ θₖ / Σₖ βᵗ⁻ᵏ over the weights θₖ after each update k = 1 … t: exponential (arXiv 2411.18704), and
    corrected for its start as Adam's moments are (arXiv 1412.6980, section 3), so that the weights before the first
    update are no part of it and θ̄₁ = θ₁. Computed as θ̄ₜ = θ̄ₜ₋₁ + (θₜ − θ̄ₜ₋₁)(1 − β)/(1 − βᵗ), in fp32 or wider.

    An entry that is exactly zero is so in the average: what a method has pruned stays so. Training goes on from the
    weights themselves; ``used`` puts the average in their place for a while, ``take`` for good.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        self.trained, self.decay, self.updates = trained, decay, 0
        self.average: dict[str, Tensor] = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in trained.items()
        }

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        self.updates += 1
        weight = (1 - self.decay) / (1 - self.decay**self.updates)
        for name, parameter in self.trained.items():
            average = self.average[name]
            average.lerp_(parameter.to(average.dtype), weight).masked_fill_(parameter == 0, 0)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the parameters are the average; afterwards, whatever happens, what they were, bit for bit."""
        held = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        try:
            self.take()
            yield
        finally:
            put(self.trained, held)

    def take(self) -> None:
        put(self.trained, self.average)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, **self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, average in self.average.items():
            average.copy_(state[name])


@torch.no_grad()
def put(trained: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in trained.items():
        parameter.copy_(values[name])
