"""Adapters of a user's own, whose hooks and faults move a run: what resuming must not lose by knowing only ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank.adapters import LoRA

POISON = ord("~")  # a byte, and so a token of the tiny models


class Remembering:
    """Adds to each gradient of B what it remembers of the steps before, the more the more there were.

    ``raises`` are the moments at which it breaks: (method, step), each once.
    """

    raises: ClassVar[set[tuple[str, int]]] = set()

    def __init__(self, adapters: Mapping[str, Any]) -> None:
        self.adapters, self.steps = adapters, 0
        self.means = {path: torch.zeros_like(adapter.B) for path, adapter in adapters.items()}

    def before_update(self, step: int) -> None:
        self.steps += 1
        for path, adapter in self.adapters.items():
            if adapter.B.grad is not None:
                self.means[path].lerp_(adapter.B.grad, 0.3)
                adapter.B.grad.add_(self.means[path], alpha=self.steps)
        self.breaks("before_update", step)

    def after_update(self, step: int) -> None:
        self.breaks("after_update", step)

    def after_step(self, record: Any) -> None:
        self.breaks("after_step", record.step)

    def event(self, step: int) -> dict[str, Any]:
        return {"event": "remembered", "steps": self.steps}

    def breaks(self, method: str, step: int) -> None:
        if (method, step) in self.raises:
            self.raises.remove((method, step))
            raise RuntimeError(f"{method} of step {step}")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, **{f"mean.{path}": mean for path, mean in self.means.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for path, mean in self.means.items():
            mean.copy_(state[f"mean.{path}"])


class Hooked(LoRA):
    """LoRA with that hook."""

    @classmethod
    def hook(cls, adapters: Mapping[str, Any], *, steps: int) -> Remembering:
        return Remembering(adapters)


class Poisoned(LoRA):
    """LoRA on the embedding whose output in training is NaN where a text has a tilde in it."""

    sites = ("embedding",)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y = super().forward(base, x)
        return y * torch.nan if self.training and bool((x == POISON).any()) else y
