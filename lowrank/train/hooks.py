"""What may watch and steer a run. A hook that only observes cannot change it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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

    def to_dict(self) -> dict[str, Any]:
        return {"event": "step", **asdict(self)}


class Hook:
    """Called by the loop; every method may be left out."""

    def before_update(self, step: int) -> None:
        """Gradients are there, clipped; the optimizer has not moved."""

    def after_update(self, step: int) -> None:
        """The optimizer has moved."""

    def after_step(self, record: StepRecord) -> None:
        """The step is over and counted."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} holds no state, but a checkpoint has some for it")
