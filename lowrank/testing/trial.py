"""One method on one base: what every property starts from, and what it may conclude."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapter
from lowrank.adapters.inject import adapter_state, apply, named_trainable
from lowrank.adapters.plan import InjectionPlan, Rules, option_names, plan
from lowrank.assemble import rule
from lowrank.errors import ConfigError
from lowrank.keys import Clock, key
from lowrank.testing.bases import Base, tokens

SEED = 3
DROPOUT = 0.3  # of a method that has the option, where dropout is looked at


@dataclass(frozen=True)
class Outcome:
    """``verdict`` is one of "holds", "FAIL", "not promised", "n/a" and "refuses"; ``detail`` says why."""

    verdict: str
    detail: str = ""


HOLDS = Outcome("holds")
fails = partial(Outcome, "FAIL")
not_promised = partial(Outcome, "not promised")
not_applicable = partial(Outcome, "n/a")


@dataclass(frozen=True)
class Trial:
    """A class with its options, on a base."""

    cls: type[Adapter]
    base: Base
    options: dict[str, Any] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()

    def rules(self, **changes: Any) -> Rules:
        options, targets = {**self.options, **changes}, self.base.targets
        if isinstance(targets, dict):
            return {pattern: rule(pattern, self.cls, options, own or {}) for pattern, own in targets.items()}
        return {
            pattern: partial(self.cls, **options) for pattern in ([targets] if isinstance(targets, str) else targets)
        }

    def plan(self, model: nn.Module, **changes: Any) -> InjectionPlan:
        return plan(model, self.rules(**changes), self.exclude)

    @cached_property
    def planned(self) -> InjectionPlan:
        return self.plan(self.base.fresh())

    @cached_property
    def refusal(self) -> str | None:
        """What the plan says where this method does not go on this base."""
        try:
            self.plan(self.base.fresh())
        except ConfigError as error:
            return str(error)
        except Exception:  # the class's own fault: the property "construction" meets it again and says so
            return None
        return None

    @property
    def dropout(self) -> dict[str, float]:
        """The change of options that gives the method dropout, where it has any."""
        return {"dropout": DROPOUT} if "dropout" in option_names(self.cls) else {}

    def wrapped(self, model: Any = None, *, clock: Clock | None = None, seed: int = SEED, **changes: Any) -> Any:
        """A fresh base (or ``model``) with the adapters on it, at their start."""
        model = self.base.fresh() if model is None else model
        return apply(model, self.plan(model, **changes) if changes else self.planned, seed, clock)

    def trained(self, model: Any = None, **changes: Any) -> Any:
        """The same away from its start, which is special: B is zero there, a scale is one."""
        return moved(self.wrapped(model, **changes))


def moved(model: Any) -> Any:
    """Every trainable value shifted by 0.05 · a normal draw."""
    with torch.no_grad():
        for name, parameter in named_trainable(model).items():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=key(1, name)).to(parameter))
    return model


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """(rows, length, vocabulary) logits without gradients."""
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens() if ids is None else ids).logits
    return found


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what an adapter's file would hold."""
    return {name: t.detach().clone() for name, t in adapter_state(model).items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """The first name under which two sets of tensors are not the same bits, or None."""
    odd = sorted(one.keys() ^ other.keys())
    return odd[0] if odd else next((name for name in one if not torch.equal(one[name], other[name])), None)


def far(one: Tensor, other: Tensor, bound: float) -> str | None:
    """``max |Δ| 3.1e-02 of 4.2``, where two tensors differ by more than ``bound`` of the second's largest entry."""
    scale = float(other.abs().max())
    apart = float((one.to(other) - other).abs().max())
    return None if apart <= bound * scale else f"max |Δ| {apart:.1e} of {scale:.1f}"
