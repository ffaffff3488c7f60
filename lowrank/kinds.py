"""What each kind of schedule takes further, in ``schedule.options``: checked before anything is loaded.

All but ``exponential``, which is ours, are transformers' (``transformers.optimization``), whose names these are.
"""

from __future__ import annotations

from typing import Any

from lowrank.errors import ConfigError
from lowrank.rules import NOT_NEGATIVE, POSITIVE, POSITIVE_NUMBER, Rule, choice, number, or_null, refuse, unknown_key

SHARE = number("a number from 0 up to 1", lambda v: 0 <= v <= 1)  # of the peak
SHAPE = choice("linear", "cosine", "1-sqrt")

OPTIONS: dict[str, dict[str, Rule]] = {
    "linear": {},
    "cosine": {},
    "constant": {},
    "constant_with_warmup": {},
    "cosine_with_restarts": {"num_cycles": POSITIVE},
    "polynomial": {"lr_end": number("a number from 0 up to, but not including, 1", lambda v: 0 <= v < 1)}
    | {"power": POSITIVE_NUMBER},
    "inverse_sqrt": {"timescale": or_null(POSITIVE)},
    "cosine_with_min_lr": {"num_cycles": POSITIVE_NUMBER, "min_lr": or_null(SHARE), "min_lr_rate": or_null(SHARE)},
    "warmup_stable_decay": {"num_decay_steps": POSITIVE, "num_stable_steps": or_null(POSITIVE)}
    | {"warmup_type": SHAPE, "decay_type": SHAPE, "min_lr_ratio": SHARE, "num_cycles": NOT_NEGATIVE},
    "exponential": {"start": number("a number between 0 and 1, both excluded", lambda v: 0 < v < 1)},
}
NEEDED = {"cosine_with_min_lr": ("min_lr_rate", "min_lr"), "warmup_stable_decay": ("num_decay_steps",)}


def check_schedule(kind: str, warmup: float, options: dict[str, Any]) -> None:
    """Raises ConfigError for an option that the kind does not take, a value out of range, or one that is missing."""
    where, known = "schedule.options", OPTIONS[kind]
    for name, value in options.items():
        if name not in known:
            raise unknown_key(f"{where}.{name}", known) if known else takes_none(f"{where}.{name}", kind)
        known[name].read(f"{where}.{name}", value)
    needed = NEEDED.get(kind, ())
    given = [name for name in needed if options.get(name) is not None]
    if needed and not given:
        raise ConfigError(f"{where}.{needed[0]}: missing; {kind} needs it. Write +{where}.{needed[0]}=….")
    if len(given) > 1:
        raise refuse(f"{where}.{given[1]}", options[given[1]], f"either {given[0]} or {given[1]}")
    if kind == "exponential" and warmup:
        raise refuse("schedule.warmup", warmup, "0, because schedule.kind=exponential grows")


def takes_none(path: str, kind: str) -> ConfigError:
    others = ", ".join(name for name, known in OPTIONS.items() if path.rpartition(".")[2] in known)
    advice = f"It is one of schedule.kind={others}." if others else "Those with options: " + with_options()
    return ConfigError(f"{path}: unknown key; schedule.kind={kind} has no options. {advice}")


def with_options() -> str:
    return ", ".join(name for name, known in OPTIONS.items() if known) + "."
