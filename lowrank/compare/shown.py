"""Keys and figures as a reader meets them: what a metric is called, its unit, its digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lowrank.compare.direction import higher_is_better
from lowrank.compare.groups import Group
from lowrank.compare.student import Difference, Estimate
from lowrank.report import figures
from lowrank.report.figures import MISSING, clean

Format = Callable[[object], str]

LABELS = {
    "trainable_parameters": "trainable parameters",
    "total_parameters": "parameters",
    "peak_memory_mb": "peak memory",
    "seconds": "training time",
    "tokens_per_s": "tokens/s",
    "real_tokens": "tokens",
    "target_tokens": "target tokens",
}
SHORT = {"trainable_parameters": "trained", "peak_memory_mb": "memory", "seconds": "time"}
EVALUATED = {measure.key: measure for measure in figures.MEASURES}


def label(metric: str) -> str:
    """``eval.after.loss`` is the held-out loss; what has no name of its own keeps its dotted one."""
    when, _, last = metric.rpartition(".")
    if last in EVALUATED and when in ("eval.after", "eval.before"):
        return EVALUATED[last].label + (" before training" if when == "eval.before" else "")
    return LABELS.get(metric, clean(metric))


def better(metric: str, higher: bool | None = None) -> str:
    """``lower is better``"""
    return f"{'higher' if (higher_is_better(metric) if higher is None else higher) else 'lower'} is better"


def formatted(metric: str) -> Format:
    """How its values are written, with their unit."""
    last = metric.rpartition(".")[2]
    if last in EVALUATED:
        return lambda value: figures.fixed(value, EVALUATED[last].digits)
    if last.endswith("_parameters") or last.endswith("_tokens"):
        return count
    match last:
        case "peak_memory_mb" | "predicted_peak_memory_mb":
            return figures.megabytes
        case "seconds":
            return figures.duration
        case "tokens_per_s":
            return figures.fixed
    return short


def short(value: object) -> str:
    return MISSING if figures.number(value) is None else figures.short(value)


def count(value: object) -> str:
    """``4.88 M``, ``1.24 B``; below ten thousand the number itself."""
    found = figures.number(value)
    if found is None or found < 10_000:
        return figures.fixed(found)
    if found < 1e6:
        return f"{found / 1e3:.1f} k"
    return f"{found / 1e9:.2f} B" if found >= 1e9 else f"{found / 1e6:.2f} M"


def between(found: Estimate | None, form: Format) -> str:
    """``3.155 to 3.711``; an en dash for one run alone."""
    if found is None or found.low is None or found.high is None:
        return MISSING
    return f"{form(found.low)} to {form(found.high)}"


def change(found: Difference | None, form: Format) -> str:
    """``+0.397`` or ``−0.397``"""
    if found is None:
        return MISSING
    return "0" if found.mean == 0 else ("+" if found.mean > 0 else "−") + form(abs(found.mean))


def probability(p: float | None) -> str:
    """``0.031``, ``< 0.001``"""
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def value(group: Group, key: str) -> str:
    """A key's value, short enough for a column: a class by its last name, a hash by its beginning."""
    if key not in group.keys:
        return MISSING
    text = clean(group.text(key)).replace("\n", " ")
    if key.endswith("_target_"):
        return text.rpartition(".")[2]
    if key in ("code", "base", "data.sha256"):
        return text[:8]
    return text if len(text) <= 40 else text[:39] + "…"


def headings(keys: Sequence[str]) -> dict[str, str]:
    """Each key's heading: its last name where that is nobody else's, ``adapter`` for ``adapter._target_``."""
    own = {key: key.split(".")[-2] if key.endswith("._target_") else key.rpartition(".")[2] for key in keys}
    names = list(own.values())
    return {key: clean(name if names.count(name) == 1 else key) for key, name in own.items()}


def name(keys: Sequence[str], group: Group) -> str:
    """``r 8, lr 0.001``; a run's name where no key tells groups apart."""
    names = headings(keys)
    told = ", ".join(f"{names[key]} {value(group, key)}" for key in keys if key in group.keys)
    return told or clean(next(iter(group.runs.values())).name)


def cost(metric: str) -> str:
    return SHORT.get(metric, label(metric))
