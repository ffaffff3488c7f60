"""A run at a glance: its name, what became of it, and the figures on top of its page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowrank.report import figures, ledger
from lowrank.report.recorded import Recorded


@dataclass(frozen=True)
class Card:
    label: str
    value: str
    note: str = ""
    before: str = ""  # shown before the value, with an arrow
    tone: str = ""  # "good" or "bad": the note's colour


def title(run: Recorded, config: dict[str, Any]) -> str:
    """``smollm2 · nf4 · LoRA r 16 · stdlib``, or the folder's name where there is no configuration."""
    model, quant, adapter, data = (
        figures.mapping(config.get(group)) for group in ("model", "quant", "adapter", "data")
    )
    name = str(model.get("name") or model.get("kind") or "").rstrip("/").rpartition("/")[2]
    method = str(adapter.get("_target_", "")).rpartition(".")[2]
    rank = f" r {adapter['r']}" if method and "r" in adapter else ""
    kind = str(quant.get("kind", "none"))
    parts = [name, kind if kind != "none" else "", method + rank, str(data.get("kind", ""))]
    return figures.clean(" · ".join(part for part in parts if part)) or figures.clean(run.folder.name)


def story(run: Recorded) -> str:
    """What a status other than ``done`` means for what the page shows."""
    last = f"The last recorded step is {figures.fixed(run.summary.get('steps'))}." if run.steps else ""
    last = last or "No step was recorded."
    match run.summary["status"]:
        case "done":
            return before_its_end(run.summary)
        case "interrupted":
            return f"The run was asked to stop and saved its state. {last} checkpoint.resume=true continues it."
        case "failed":
            return f"The run failed. {last}"
        case _:
            return f"No summary was written: the run is still going, or was cut off. {last}"


def before_its_end(summary: dict[str, Any]) -> str:
    """What made a run leave its loop early; empty where it went to its last step."""
    pruned = figures.mapping(summary.get("pruned"))
    ends = [
        (summary.get("stopped_early"), "the held-out loss had not fallen any more (loop.patience)"),
        (pruned.get("step"), "other jobs of the sweep had come further by then (loop.prune)"),
        (summary.get("diverged"), "the loss had run away (loop.diverged)"),
    ]
    found = ((step, why) for step, why in ends if figures.number(step) is not None)
    return next((f"Training ended after step {figures.fixed(step)}: {why}." for step, why in found), "")


def cards(run: Recorded) -> list[Card]:
    """Those that have a value."""
    summary = run.summary
    changes = {change.label: change for change in figures.changes(summary)}
    trained, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    share = figures.percent(trained, total, 2) if figures.number(trained) and figures.number(total) else ""
    gain = figures.gain(summary)
    found = [
        of_change(changes.get("held-out loss"), "Held-out loss"),
        of_change(changes.get("perplexity"), "Perplexity"),
        Card("ROUGE-L gain", gain[0], f"95 % interval {gain[1]}")
        if gain
        else of_change(changes.get("ROUGE-L"), "ROUGE-L"),
        Card("Speed", figures.fixed(summary.get("tokens_per_s")), "real tokens a second"),
        Card("Peak memory", figures.megabytes(summary.get("peak_memory_mb")), ledger.expected(summary)),
        Card("Trainable", millions(trained), share and f"{share} of {millions(total)} parameters"),
        Card("Duration", figures.duration(summary.get("seconds")), work(summary)),
    ]
    return [card for card in found if card.value != figures.MISSING or card.before]


def of_change(change: figures.Change | None, label: str) -> Card:
    if change is None:
        return Card(label, figures.MISSING)
    tone = {True: "good", False: "bad", None: ""}[change.better]
    if change.after == figures.MISSING and change.before != figures.MISSING:
        return Card(label, change.before, "of the untouched base")
    before = "" if change.before == figures.MISSING else change.before
    return Card(label, change.after, "" if change.change == figures.MISSING else change.change, before, tone)


def millions(count: object) -> str:
    """``4.88 M``, ``1.24 B``; below ten thousand the count itself."""
    found = figures.number(count)
    if found is None or found < 10_000:
        return figures.fixed(count)
    return f"{found / 1e9:.2f} B" if found >= 1e9 else f"{found / 1e6:.2f} M"


def work(summary: dict[str, Any]) -> str:
    steps, tokens = summary.get("steps"), summary.get("real_tokens")
    if figures.number(steps) is None:
        return ""
    return f"{figures.fixed(steps)} steps" + ("" if tokens is None else f", {figures.fixed(tokens)} tokens")
