"""How a step's gradients become its update: a parameter at a time here, over one memory in ``flat``, and while backward
still runs in ``in_backward``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowrank.train import finite


class Update(Protocol):
    """What the loop calls in a step, in this order. None of it waits for a device."""

    at_once: bool  # parameters move within backward: a loss is looked at before it, and no gradient can be taken back

    def clear(self) -> None:
        """Before the first forward: no parameter has a gradient."""

    def gathered(self) -> torch.optim.Optimizer:
        """After the last backward: an optimizer that has all gradients, for a loss scale to be taken out of them."""

    def norm(self) -> Tensor:
        """Of all gradients together, a scalar."""

    def clip(self, max_norm: float, norm: Tensor, length: float) -> None:
        """Gradients of ``norm``, of which ``length`` is the number, times min(1, max_norm / (norm + 1e-6))."""

    def step(self) -> None:
        """The optimizer's."""

    def size(self) -> Tensor:
        """The norm of all parameters together, a scalar."""

    def release(self) -> None:
        """Training is over: parameters are as any others."""

    def bad(self) -> dict[str, str]:
        """name → ``nan`` or ``inf`` of every gradient that is not finite, in the reverse of backward's order."""


class EachParameter:
    """The textbook's, by the optimizer itself: whatever it is, and whatever trains. ``why`` it is not another way."""

    at_once = False

    def __init__(self, optimizer: torch.optim.Optimizer, why: str = "") -> None:
        self.optimizer, self.why = optimizer, why
        self.parameters = named(optimizer)

    def __str__(self) -> str:
        return f"optimizer a parameter at a time ({': '.join(filter(None, [called(self.optimizer), self.why]))})"

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def gathered(self) -> torch.optim.Optimizer:
        return self.optimizer

    def norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    def clip(self, max_norm: float, norm: Tensor, length: float) -> None:
        if shortens(max_norm, length):
            nn.utils.clip_grads_with_norm_(self.parameters.values(), max_norm, norm)

    def step(self) -> None:
        self.optimizer.step()

    def size(self) -> Tensor:
        return nn.utils.get_total_norm([p.detach() for p in self.parameters.values()])

    def release(self) -> None:
        """They always were."""

    def bad(self) -> dict[str, str]:
        return finite.bad(finite.gradients(self.parameters))


def named(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """What an optimizer of named groups moves, group by group."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def called(optimizer: torch.optim.Optimizer) -> str:
    """``AdamW, fused``"""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return type(optimizer).__name__ + (", fused" if fused else "")


def shortens(max_norm: float, length: float) -> bool:
    """Whether clipping may change a bit: well below ``max_norm`` it would multiply by exactly 1."""
    return length * (1 + 1e-5) + 1e-5 > max_norm


def twin(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], state: Any) -> Any:
    """An optimizer of the same class and options, whether groups tell them or not, over other groups and this state."""
    found = object.__new__(type(optimizer))
    vars(found).update({**vars(optimizer), "param_groups": groups, "state": state})
    return found


def follow(groups: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> None:
    """Learning rates and all other options as the others have them now."""
    for mine, theirs in zip(groups, others, strict=True):
        mine.update(options(theirs))


def options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "names")}
