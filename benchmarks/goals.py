"""What was promised, each beside what was measured: met, missed, or unmeasured. Nothing is estimated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Found = Mapping[str, Any]  # results.json
Values = list[float]
TRAINER, GROUPED, PACKED, OURS = (
    "PEFT + Trainer",
    "PEFT + Trainer, grouped by length",
    "PEFT, our packs and head rows",
    "lowrank",
)
LIGER, TRL = "TRL, PEFT, Liger", "TRL, PEFT"


@dataclass(frozen=True)
class Goal:
    """``value`` gives what was measured, a value a round; it raises KeyError where something is missing."""

    what: str
    bound: str
    value: Callable[[Found], Values]
    met: Callable[[float], bool]
    form: str = ".2f"
    unit: str = "×"

    def measured(self, found: Found) -> Values:
        """Empty where it was not."""
        try:
            return self.value(found)
        except KeyError:
            return []

    def row(self, found: Found) -> str:
        values = self.measured(found)
        if not values:
            return f"| {self.what} | {self.bound} | | unmeasured |"
        status = "met" if self.met(median(values)) else "missed"
        return f"| {self.what} | {self.bound} | {spread(values, self.form, self.unit)} | {status} |"


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """``163 (160–165)``: median, lowest, highest."""
    middle, low, high = (format(value, form) for value in (median(values), min(values), max(values)))
    return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low}–{high})"


def ratio(piece: str, ours: str, theirs: str, figure: str = "tokens_per_s") -> Callable[[Found], Values]:
    """Round by round."""

    def value(found: Found) -> Values:
        arms = found[piece]["arms"]
        return [a / b for a, b in zip(arms[ours][figure], arms[theirs][figure], strict=True)]

    return value


def figure(piece: str, arm: str, name: str, scale: float = 1.0) -> Callable[[Found], Values]:
    return lambda found: [scale * value for value in found[piece]["arms"][arm][name]]


def within(piece: str, arm: str, one: str, other: str) -> Callable[[Found], Values]:
    return lambda found: [
        a / b for a, b in zip(found[piece]["arms"][arm][one], found[piece]["arms"][arm][other], strict=True)
    ]


def ends(piece: str, name: str, turned: bool = False) -> Callable[[Found], Values]:
    """The last point of a curve in its first's, round by round; ``turned``: the first in the last's."""

    def value(found: Found) -> Values:
        arms = list(found[piece]["arms"].values())
        first, last = (arms[place][name] for place in ((-1, 0) if turned else (0, -1)))
        return [b / a for a, b in zip(first, last, strict=True)]

    return value


def off(piece: str) -> Callable[[Found], Values]:
    """How far the points of a curve are from its prediction: the largest |measured / predicted − 1|."""
    from benchmarks.curves import drawn

    return lambda found: [drawn(piece, found).off]


def ledger(name: str) -> Callable[[Found], Values]:
    """Of all arms whose run predicted it, the largest |measured / predicted − 1|."""

    def value(found: Found) -> Values:
        pairs = [
            (median(arm[name]), arm["predicted"][name])
            for piece in found.values()
            for arm in piece["arms"].values()
            if name in arm and name in arm.get("predicted", {})
        ]
        if not pairs:
            raise KeyError(name)
        return [max(abs(measured / predicted - 1) for measured, predicted in pairs)]

    return value


def least(bound: float) -> Callable[[float], bool]:
    return lambda value: value >= bound


def most(bound: float) -> Callable[[float], bool]:
    return lambda value: value <= bound


def near(bound: float) -> Callable[[float], bool]:
    return lambda value: abs(value - 1) <= bound


def share(what: str, bound: float, value: Callable[[Found], Values]) -> Goal:
    return Goal(what, f"± {bound:.0%}", value, most(bound), ".1%", "")


TABLE = [
    Goal("real tokens/s, of PEFT + Trainer on real lengths", "≥ 3×", ratio("peers", OURS, TRAINER), least(3)),
    Goal("… of the Trainer grouping by length", "≥ 2×", ratio("peers", OURS, GROUPED), least(2)),
    Goal("… of PEFT given our packs and head rows", "≥ 1.6×", ratio("peers", OURS, PACKED), least(1.6)),
    Goal("peak RSS, of PEFT + Trainer's", "≤ 0.40×", ratio("peers", OURS, TRAINER, "peak_mb"), most(0.4)),
    Goal(
        "bytes kept for backward, of the formula",
        "± 1 %",
        within("saved", OURS, "saved_mb", "formula_mb"),
        near(0.01),
        ".3f",
    ),
    Goal(
        "losses of 50 steps apart from packed PEFT's",
        "< 1e-5",
        lambda found: [found["losses"]["apart"]],
        lambda v: v < 1e-5,
        ".1e",
        "",
    ),
    Goal(
        "… ours from the same in fp64, of PEFT's distance from it",
        "≤ 1×",
        lambda found: [found["losses"]["from_fp64"] / found["losses"]["peer_from_fp64"]],
        most(1),
    ),
    Goal("AdaLoRA's tokens/s, of LoRA's", "≥ 0.95×", ratio("methods", "AdaLoRA", "LoRA"), least(0.95)),
    Goal("prefix-20's tokens/s, of LoRA's", "≥ 0.97×", ratio("methods", "prefix-20", "LoRA"), least(0.97)),
    Goal("a step with dropout 0.05, of one without", "≤ 1.15×", ratio("methods", "LoRA", "dropout 0.05"), most(1.15)),
    Goal("bf16 in hardware (AMX), both sides: of PEFT + Trainer", "≥ 3×", ratio("peers-bf16", OURS, TRAINER), least(3)),
    Goal("… of our own fp32", "≥ 2×", ratio("peers-bf16", OURS, "lowrank, fp32"), least(2)),
]


def curves(prefix: str = "") -> list[Goal]:
    """Of the pieces whose names begin so."""
    return [
        share("memory against T: slope, of the formula", 0.02, off(f"{prefix}memory")),
        share("real tokens/s against length variance: flat", 0.03, off(f"{prefix}variance")),
        share("tokens/s against resident adapters: flat", 0.02, off(f"{prefix}residents")),
        Goal("r = 64, of r = 8", "≥ 0.93×", ends(f"{prefix}ranks", "tokens_per_s"), least(0.93)),
        share("memory of the loss against V: flat", 0.10, off(f"{prefix}loss")),
        Goal("a step with 5 % targets, of one with 75 %", "< 1×", ends(f"{prefix}targets", "seconds"), lambda v: v < 1),
        share("adapters on the top k layers: the formula", 0.08, off(f"{prefix}top")),
    ]


CURVES = curves()
LEDGER = [
    share("ledger: peak", 0.05, ledger("peak_mb")),
    share("ledger: tokens/s", 0.10, ledger("tokens_per_s")),
]


def unmade(found: Found) -> Values:
    """Of a goal that no script measures yet."""
    raise KeyError


CUDA = [
    Goal(
        "7B, bf16, s = 2,048: tokens/s", "≥ 14,500", figure("7b-peft", OURS, "tokens_per_s"), least(14500), ",.0f", ""
    ),
    Goal("… of PEFT given the same packs", "≥ 1.45×", ratio("7b-peft", OURS, PACKED), least(1.45)),
    Goal("… of PEFT + Liger (TRL)", "≥ 1.25×", ratio("7b-liger", OURS, LIGER), least(1.25)),
    Goal("… peak, of PEFT's given the same packs", "≤ 0.60×", ratio("7b-peft", OURS, PACKED, "peak_mb"), most(0.6)),
    Goal("8B, T = 8,192: peak", "≤ 50 GB", figure("8b", OURS, "peak_mb", 1e-3), most(50), ".1f", " GB"),
    Goal("… recomputing", "≤ 20 GB", figure("8b-recompute", OURS, "peak_mb", 1e-3), most(20), ".1f", " GB"),
    Goal("QLoRA's tokens/s, of bf16's, T = 8,192", "≥ 0.95×", ratio("7b-nf4", "nf4", "dense"), least(0.95)),
    Goal("… T = 2,048", "≥ 0.88×", ratio("7b-nf4-2k", "nf4", "dense"), least(0.88)),
    Goal("QLoRA's peak, T = 8,192", "≤ 32 GB", figure("7b-nf4", "nf4", "peak_mb", 1e-3), most(32), ".1f", " GB"),
    Goal("… recomputing", "≤ 10 GB", figure("7b-nf4-recompute", "nf4", "peak_mb", 1e-3), most(10), ".1f", " GB"),
    Goal("1B: tokens/s", "≥ 60,000", figure("1b-peft", OURS, "tokens_per_s"), least(60000), ",.0f", ""),
    Goal(
        "loss layer, 8,192 × 128,256 × 4,096: of two bare products",
        "≤ 1.15×",
        within("loss-8b", "chunks", "seconds", "products"),
        most(1.15),
    ),
    Goal(
        "… memory above inputs and result",
        "≤ 1.2 GB",
        figure("loss-8b", "chunks", "extra_mb", 1e-3),
        most(1.2),
        ".2f",
        " GB",
    ),
    Goal("dropout 0.05, a step, of one without", "≤ 1.03×", ratio("1b-dropout", "LoRA", "dropout 0.05"), most(1.03)),
    Goal("optimizer and clipping", "≤ 1 ms", unmade, most(1), ".2f", " ms"),
    Goal("a save keeps the loop waiting", "≤ 50 ms", unmade, most(50), ".0f", " ms"),
    Goal("tokens/s at s = 2k, of those at 32k", "≤ 2.2×", ends("1b-lengths", "tokens_per_s", turned=True), most(2.2)),
    *curves("1b-"),
]
