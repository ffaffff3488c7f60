"""``report.html``: one run on one page that needs no network, no script and no other file."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lowrank.disk import write_text
from lowrank.errors import RefusedError
from lowrank.report import charts, figures, learnt, ledger
from lowrank.report.recorded import Recorded, read

OPEN = 3  # samples shown at once; the others are folded
MOST = 200  # samples on a page
TAIL = 40  # lines of events.log
KINDS = 20  # rows of a profile


@dataclass(frozen=True)
class Card:
    label: str
    value: str
    note: str = ""
    before: str = ""  # shown before the value, with an arrow
    tone: str = ""  # "good" or "bad": the note's colour


@dataclass(frozen=True)
class Sample:
    row: str
    prompt: str
    reference: str
    base: str
    tuned: str


def write(folder: Path) -> Path:
    """Write ``folder``/report.html from the run directory's files, whichever are there; its path.

    The page appears whole or not at all. Raises RefusedError where ``folder`` is not a directory.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RefusedError(f"{folder}: no such run directory.")
    return write_text(folder / "report.html", page(read(folder)))


def page(run: Recorded) -> str:
    """The whole page as text."""
    config = _config(run)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    samples = [_sample(row) for row in run.samples]
    events = run.texts.get("events.log", "").splitlines()
    return environment.get_template("run.html.j2").render(
        title=_title(run, config),
        folder=figures.clean(run.folder),
        status=figures.clean(run.summary["status"]),
        story=_story(run),
        cards=_cards(run),
        charts=charts.draw(run, config),
        changes=figures.changes(run.summary),
        learnt=learnt.notes_of(run.spectra),
        profile=_profile(run.profile),
        memory=ledger.lines(run.ledger),
        before=_when(run, "before"),
        after=_when(run, "after"),
        notes=_notes(run),
        shown=samples[:OPEN],
        folded=samples[OPEN:MOST],
        left_out=max(0, len(samples) - MOST),
        plan=run.texts.get("plan.txt", ""),
        config=run.texts.get("config.yaml", ""),
        events="\n".join(events[-TAIL:]),
        versions=_versions(run.summary),
        command=_command(run.summary.get("command")),
        unread=run.unread,
    )


def _config(run: Recorded) -> dict[str, Any]:
    try:
        return figures.mapping(yaml.safe_load(run.texts.get("config.yaml", "")))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}  # the page shows the text as it is


def _title(run: Recorded, config: dict[str, Any]) -> str:
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


def _story(run: Recorded) -> str:
    """What a status other than ``done`` means for what the page shows."""
    step = figures.fixed(run.summary.get("steps"))
    last = f"The last recorded step is {step}." if run.steps else "No step was recorded."
    match run.summary["status"]:
        case "done":
            return ""
        case "interrupted":
            return f"The run was asked to stop and saved its state. {last}"
        case "failed":
            return f"The run failed. {last}\n{figures.clean(run.summary.get('error', ''))}".rstrip()
        case _:
            return f"No summary was written: the run is still going, or was cut off. {last}"


def _when(run: Recorded, when: str) -> str:
    """The table's heading: ``after``, or the step of the last evaluation where the run did not reach its end."""
    found = figures.evaluation(run.summary, when)
    step = figures.number(found.get("step"))
    cut_short = when == "after" and step is not None and run.summary["status"] != "done"
    return f"step {figures.fixed(step)}" if cut_short else when


def _cards(run: Recorded) -> list[Card]:
    summary = run.summary
    changes = {change.label: change for change in figures.changes(summary)}
    trained, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    share = figures.percent(trained, total, 2) if figures.number(trained) and figures.number(total) else ""
    gain = figures.gain(summary)
    return [
        _change_card(changes.get("held-out loss"), "Held-out loss"),
        _change_card(changes.get("perplexity"), "Perplexity"),
        Card("ROUGE-L gain", gain[0], f"95 % interval {gain[1]}")
        if gain
        else _change_card(changes.get("ROUGE-L"), "ROUGE-L"),
        Card("Speed", figures.fixed(summary.get("tokens_per_s")), "real tokens a second"),
        Card("Peak memory", figures.megabytes(summary.get("peak_memory_mb")), ledger.expected(summary)),
        Card("Trainable", _millions(trained), share and f"{share} of {_millions(total)} parameters"),
        Card("Duration", figures.duration(summary.get("seconds")), _work(summary)),
    ]


def _change_card(change: figures.Change | None, label: str) -> Card:
    if change is None:
        return Card(label, figures.MISSING, "not measured")
    tone = {True: "good", False: "bad", None: ""}[change.better]
    before = "" if change.before == figures.MISSING else change.before
    return Card(label, change.after, "" if change.change == figures.MISSING else change.change, before, tone)


def _millions(count: object) -> str:
    """``4.88 M``, ``1.24 B``; below ten thousand the count itself."""
    found = figures.number(count)
    if found is None or found < 10_000:
        return figures.fixed(count)
    return f"{found / 1e9:.2f} B" if found >= 1e9 else f"{found / 1e6:.2f} M"


def _work(summary: dict[str, Any]) -> str:
    steps, tokens = summary.get("steps"), summary.get("real_tokens")
    if figures.number(steps) is None:
        return ""
    return f"{figures.fixed(steps)} steps" + ("" if tokens is None else f", {figures.fixed(tokens)} tokens")


def _notes(run: Recorded) -> list[str]:
    """The table's footnotes: how the scores were made."""
    after = figures.evaluation(run.summary, "after")
    notes = []
    if gain := figures.gain(run.summary):
        notes.append(f"ROUGE-L gain {gain[0]}, 95 % bootstrap interval {gain[1]}, over the same held-out rows.")
    for name, label in (("bleu_signature", "BLEU"), ("chrf_signature", "chrF")):
        if after.get(name):
            notes.append(f"{label} signature {figures.clean(after[name])}")
    return notes


def _sample(row: dict[str, Any]) -> Sample:
    texts = {name: figures.clean(row.get(name) or "") for name in ("prompt", "reference", "base", "tuned")}
    return Sample(row=figures.clean(row.get("row", "")), **texts)


def _profile(told: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Kind of work, its share of a profiled step and its milliseconds; what took no time is left out."""
    shares, times = figures.mapping(told.get("shares")), figures.mapping(told.get("ms"))
    rows = []
    for kind, given in list(shares.items())[:KINDS]:
        share = figures.number(given)
        if share is not None and 0 < share <= 1:
            rows.append((figures.clean(kind), f"{share:.1%}", figures.fixed(times.get(kind), 1)))
    return rows


def _versions(summary: dict[str, Any]) -> list[tuple[str, str]]:
    found = figures.mapping(summary.get("versions"))
    seed = [("seed", figures.clean(summary["seed"]))] if "seed" in summary else []
    return seed + [(figures.clean(name), figures.clean(version)) for name, version in found.items()]


def _command(command: object) -> str:
    """A shell line, whether the run kept a string or an argument list."""
    if isinstance(command, list):
        return figures.clean(shlex.join(str(part) for part in command))
    return figures.clean(command or "")
