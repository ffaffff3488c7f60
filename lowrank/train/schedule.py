"""Learning rates as a pure function of the step, so that a schedule has no state to save."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Schedule = Callable[[int], float]  # optimizer step (1 is the first) → factor of the peak learning rate


def warmup_steps(warmup: float, total: int) -> int:
    """``warmup`` is a number of steps, or below 1 a fraction of ``total``."""
    return round(warmup * total) if warmup < 1 else int(warmup)


def schedule(kind: str, *, warmup: float, total: int, options: dict[str, Any] | None = None) -> Schedule:
    """The factor of the peak learning rate at each step.

    Warm-up is linear and starts at 1/warm-up, not at 0: the first step trains. Step ``warm-up`` and the one after
    have the peak; then ``linear`` falls towards 0, reached one step after ``total``, ``cosine`` by half a cosine,
    ``constant`` stays; any other kind is transformers' (``get_scheduler``), but for ``exponential``, which grows to the
    peak and has no warm-up. Raises ValueError where a kind or its options are not known, or its learning rate is not a
    function of the step.
    """
    if kind == "exponential":
        return growth(warmup, total, options or {})
    warm = warmup_steps(warmup, total)
    after = decay(kind, warm, total, options or {})
    return lambda step: step / warm if step <= warm else after(step - 1)


def growth(warmup: float, total: int, options: dict[str, Any]) -> Schedule:
    """A learning-rate range test (Smith, arXiv 1506.01186): from ``options["start"]`` times the peak at the first step
    to the peak at the last, each step by the same factor."""
    unknown = [name for name in options if name != "start"]
    if unknown:
        raise ValueError(f"schedule.options.{unknown[0]}: unknown key. Allowed with schedule.kind=exponential: start.")
    start = options.get("start", 1e-4)
    if isinstance(start, bool) or not isinstance(start, (int, float)) or not 0 < start < 1:
        raise ValueError(f"schedule.options.start: {start} is not allowed; a number between 0 and 1, both excluded.")
    if warmup:
        raise ValueError(f"schedule.warmup: {warmup:g} is not allowed; 0, because schedule.kind=exponential grows.")
    return lambda step: start ** (1 - min(1.0, (step - 1) / max(1, total - 1)))


def decay(kind: str, warm: int, total: int, options: dict[str, Any]) -> Schedule:
    """The factor after ``done`` finished steps, ``done`` ≥ warm-up."""

    def progress(done: int) -> float:
        return min(1.0, (done - warm) / max(1, total - warm))

    if options and kind in ("constant", "constant_with_warmup", "linear", "cosine"):
        raise ValueError(f"schedule.options: '{kind}' has none (given: {', '.join(options)}).")
    match kind:
        case "constant" | "constant_with_warmup":
            return lambda done: 1.0
        case "linear":
            return lambda done: 1.0 - progress(done)
        case "cosine":
            return lambda done: 0.5 * (1.0 + math.cos(math.pi * progress(done)))
        case _:
            return transformers_schedule(kind, warm, total, options)


def transformers_schedule(kind: str, warm: int, total: int, options: dict[str, Any]) -> Schedule:
    from transformers import get_scheduler

    unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    try:
        made = get_scheduler(
            kind, unused, num_warmup_steps=warm, num_training_steps=total, scheduler_specific_kwargs=options
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"schedule.options: {error}") from error
    factors = getattr(made, "lr_lambdas", None)
    if not factors:
        raise ValueError(f"schedule.kind: '{kind}' does not give the learning rate as a function of the step.")
    return lambda done: float(factors[0](done))
