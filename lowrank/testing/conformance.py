"""The contract as a table: every property on every base."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank.adapters.base import Adapter
from lowrank.adapters.plan import class_and_options
from lowrank.errors import ConfigError
from lowrank.models.quiet import quiet
from lowrank.testing import calls, fused, gradients, start, storage, weights
from lowrank.testing.bases import columns
from lowrank.testing.trial import Outcome, Trial, fails

PROPERTIES: dict[str, Callable[[Trial], Outcome]] = {
    "construction": start.construction,
    "identity at start": start.identity,
    "trainable parameters": start.trainable,
    "keyed seeds": start.seeds,
    "independent starts": start.independent,
    "site gradients": gradients.of_sites,
    "model gradients": gradients.of_the_model,
    "base untouched": weights.untouched,
    "merge": weights.merging,
    "dtypes and devices": weights.moves,
    "dropout replay": calls.dropout,
    "checkpointing": calls.checkpointing,
    "fast path": fused.same,
    "packing": calls.packing,
    "generation": calls.generation,
    "save and load": storage.saving,
    "resume": storage.resuming,
    "removal": weights.removal,
    "copies": weights.copies,
}


@dataclass(frozen=True)
class Row:
    property: str
    base: str
    verdict: str  # "holds", "FAIL", "not promised", "n/a" or "refuses"
    detail: str = ""


@dataclass(frozen=True)
class Conformance:
    """What holds of a class and what does not. ``print`` shows the table, a line for each property."""

    title: str
    rows: tuple[Row, ...]

    @property
    def failures(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.verdict == "FAIL")

    @property
    def passed(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        bases = list(dict.fromkeys(row.base for row in self.rows))
        verdicts = {(row.property, row.base): row.verdict for row in self.rows}
        names = list(dict.fromkeys(row.property for row in self.rows))
        cells = [["", *bases], *([name, *(verdicts[name, base] for base in bases)] for name in names)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        wrong = [f"FAIL {row.property} on {row.base}: {row.detail}" for row in self.failures]
        held = sum(row.verdict == "holds" for row in self.rows)
        last = f"{held} promises hold" if self.passed else f"{len(wrong)} of {held + len(wrong)} promises do not hold"
        return "\n".join([self.title, *table, "", *wrong, *self.notes(), f"{last}."])

    def notes(self) -> list[str]:
        """Why something was not tried, once for all bases with one reason."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.detail and row.verdict != "FAIL":
                what = "refuses" if row.verdict == "refuses" else f"{row.verdict}: {row.property}"
                reasons.setdefault((what, row.detail), []).append(row.base)
        return [f"{what} on {', '.join(dict.fromkeys(bases))}: {why}" for (what, why), bases in reasons.items()]


def conformance(cls: type[Adapter], *, targets: Any = None, exclude: Sequence[str] = (), **options: Any) -> Conformance:
    """Tries every property of the contract on every base that the class says it goes on.

    ``targets`` and ``exclude`` are as in a YAML; without them it goes wherever its ``sites`` say. Raises ConfigError
    where an option is unknown or out of range.
    """
    class_and_options(partial(cls, **options))
    trials = [Trial(cls, base, options, tuple(exclude)) for base in columns(cls, targets)]
    refusals = [trial.refusal for trial in trials]
    if all(refusals):
        raise ConfigError(str(refusals[0]))
    shown = ", ".join(f"{name}={value}" for name, value in options.items())
    return Conformance(f"{cls.__module__}.{cls.__qualname__}({shown})", tuple(r for t in trials for r in examine(t)))


def assert_conforms(cls: type[Adapter], **options: Any) -> None:
    """``conformance``, with an AssertionError that carries the table where a promise fails."""
    found = conformance(cls, **options)
    if not found.passed:
        raise AssertionError(f"\n{found}")


def examine(trial: Trial) -> list[Row]:
    """Every property of one trial, in order; what cannot be built is tried no further."""
    first, *others = PROPERTIES
    rows = [examined(trial, first)]
    if rows[0].verdict == "FAIL":
        return rows + [Row(name, trial.base.name, "n/a", f"not tried, because {first} fails") for name in others]
    return rows + [examined(trial, name) for name in others]


def examined(trial: Trial, name: str) -> Row:
    """One property of one trial. Torch's default generator is left as it was found."""
    if trial.refusal is not None:
        return Row(name, trial.base.name, "refuses", trial.refusal)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), quiet():
        torch.manual_seed(0)
        try:
            outcome = PROPERTIES[name](trial)
        except Exception as error:
            if os.environ.get("LOWRANK_DEBUG") == "1":
                traceback.print_exception(error)
            outcome = fails(described(error, trial.cls))
    return Row(name, trial.base.name, outcome.verdict, outcome.detail)


def described(error: Exception, cls: type[Adapter]) -> str:
    """``RuntimeError: shapes cannot be multiplied (my_adapter.py:17, in forward)``, the place in the class's file."""
    frames = traceback.extract_tb(error.__traceback__)
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    own = [frame for frame in frames if frame.filename == file]
    place = (own or list(frames))[-1]
    message = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {message} ({Path(place.filename).name}:{place.lineno}, in {place.name})"
