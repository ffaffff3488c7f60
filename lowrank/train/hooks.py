"""What may watch and steer a run. A hook that only observes cannot change it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lowrank.train.finite import Fault


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: what metrics.jsonl holds of it. Tokens and seconds are of this step alone."""

    step: int
    loss: float  # mean over the step's target tokens
    lr: float
    grad_norm: float  # before clipping
    target_tokens: int
    real_tokens: int
    tokens_per_s: float  # real tokens
    peak_memory_mb: float
    seconds: float
    spike: bool = False  # the loss stands far above those before it

    def to_dict(self) -> dict[str, Any]:
        return {"event": "step", **asdict(self)}


class Hook:
    """Called by the loop; every method may be left out."""

    def before_update(self, step: int) -> None:
        """Gradients are there, clipped; the optimizer has not moved. (Under ``optim.in_backward`` it has, and they are
        gone.)"""

    def after_update(self, step: int) -> None:
        """The optimizer has moved."""

    def after_step(self, record: StepRecord) -> None:
        """The step is over and counted."""

    def after_skip(self, fault: Fault) -> None:
        """A batch was passed over, since something in it was not finite; its step comes again with the next."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and JSON values by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} holds no state, but a checkpoint has some for it")


def split(states: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The states of several hooks by name, which has no dot, as the tensors of one file, ``0.importance``, and JSON
    values by that name."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for hook, state in states.items():
        tensors |= {f"{hook}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        values[hook] = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return tensors, values


def join(tensors: Mapping[str, Tensor], values: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What ``split`` took apart."""
    states = {hook: dict(held) for hook, held in values.items()}
    for name, tensor in tensors.items():
        hook, _, key = name.partition(".")
        states[hook][key] = tensor
    return states
