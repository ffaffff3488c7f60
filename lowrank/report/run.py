"""``report.html``: one run on one page that needs no network, no script and no other file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lowrank.disk import write_text
from lowrank.errors import RefusedError
from lowrank.report import cards, charts, dataset, figures, learnt, ledger
from lowrank.report.gap import gap_of
from lowrank.report.origin import origin
from lowrank.report.recorded import Recorded, read
from lowrank.report.samples import sample

OPEN = 3  # samples shown at once; the others are folded
MOST = 200  # samples on a page
TAIL = 40  # lines of events.log
KINDS = 20  # rows of a profile


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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("run.html.j2").render(told(run, _config(run)))


def told(run: Recorded, config: dict[str, Any]) -> dict[str, Any]:
    """What the templates show, by the names that they use."""
    gap, memory = gap_of(run), ledger.lines(run.ledger)
    shown = [sample(row) for row in run.samples[:MOST]]
    events = run.texts.get("events.log", "").splitlines()
    return {
        "title": cards.title(run, config),
        "folder": figures.clean(run.folder),
        "status": figures.clean(run.summary["status"]),
        "story": cards.story(run),
        "error": figures.clean(run.summary.get("error") or "") if run.summary["status"] == "failed" else "",
        "cards": cards.cards(run),
        "charts": charts.draw(run, config, gap),
        "overfit": "" if run.summary.get("lr_range") else str(gap or ""),
        "changes": figures.changes(run.summary) if _when(run, "before") or _when(run, "after") else [],
        "learnt": learnt.notes_of(run.spectra),
        "profile": _profile(run.profile),
        "memory": memory,
        "measured": any(line.measured for line in memory),
        "before": _when(run, "before"),
        "after": _when(run, "after"),
        "notes": _notes(run),
        "shown": shown[:OPEN],
        "folded": shown[OPEN:],
        "left_out": max(0, len(run.samples) - MOST),
        "data": dataset.card(run.data or figures.mapping(run.summary.get("data")), config),
        "plan": run.texts.get("plan.txt", ""),
        "config": run.texts.get("config.yaml", ""),
        "events": "\n".join(events[-TAIL:]),
        "origin": origin(run),
        "unread": run.unread,
    }


def _config(run: Recorded) -> dict[str, Any]:
    try:
        return figures.mapping(yaml.safe_load(run.texts.get("config.yaml", "")))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}  # the page shows the text as it is


def _when(run: Recorded, when: str) -> str:
    """The column's heading: ``after``, or the step of the last evaluation where the run did not reach its end; empty
    where nothing was measured then."""
    found = figures.evaluation(run.summary, when)
    if not any(figures.number(found.get(measure.key)) is not None for measure in figures.MEASURES):
        return ""
    step = figures.number(found.get("step"))
    cut_short = when == "after" and step is not None and run.summary["status"] != "done"
    return f"step {figures.fixed(step)}" if cut_short else when


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


def _profile(told: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Kind of work, its share of a profiled step and its milliseconds; what took no time is left out."""
    shares, times = figures.mapping(told.get("shares")), figures.mapping(told.get("ms"))
    rows = []
    for kind, given in list(shares.items())[:KINDS]:
        share = figures.number(given)
        if share is not None and 0 < share <= 1:
            rows.append((figures.clean(kind), f"{share:.1%}", figures.fixed(times.get(kind), 1)))
    return rows
