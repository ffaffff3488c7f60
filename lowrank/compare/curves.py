"""Learning curves laid over each other: the held-out loss where it was measured on the way, else the training loss."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.compare import plot, shown
from lowrank.compare.groups import Group
from lowrank.compare.ranking import Ranking
from lowrank.record.directory import METRICS
from lowrank.report.curves import Point, smooth, thinned
from lowrank.report.figures import mapping, number
from lowrank.report.ranks import picture
from lowrank.report.svg import PAGE, Frame, safe, text

NAMED = 5  # of the best: in colour, each with a dash of its own
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2")
ROWS = 400  # of a run's steps that are read: as fine as a curve can be drawn
LARGEST = 64 << 20  # bytes of a metrics.jsonl that is read for a curve
WIDTH, HEIGHT = 1072, 400


@dataclass(frozen=True)
class Course:
    """One run over its steps."""

    held_out: list[Point]
    training: list[Point]


def course(folder: Path) -> Course:
    """From ``metrics.jsonl``: every evaluation and at most ``ROWS`` steps; empty where it cannot be read."""
    try:
        if (folder / METRICS).stat().st_size > LARGEST:
            return Course([], [])
        lines = (folder / METRICS).read_bytes().splitlines()
    except OSError:
        return Course([], [])
    evals = [row for line in lines if b'"eval"' in line and (row := read(line)).get("event") == "eval"]
    steps = [line for line in lines if b'"step", "step"' in line]
    kept = steps[:: max(1, len(steps) // ROWS)]
    return Course(points(evals), points([read(line) for line in kept]))


def read(line: bytes) -> dict[str, Any]:
    try:
        return mapping(json.loads(line))
    except (ValueError, RecursionError):
        return {}


def points(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """(step, loss), ascending; of a step written twice the later row; a loss that is not finite is left out."""
    found = {
        step: loss
        for row in rows
        if (step := number(row.get("step"))) is not None and (loss := number(row.get("loss"))) is not None
    }
    return sorted(found.items())


def averaged(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean over seeds at each step that all of them have."""
    told = [dict(curve) for curve in curves if curve]
    steps = sorted(set.intersection(*(set(one) for one in told))) if told else []
    return [(step, math.fsum(one[step] for one in told) / len(told)) for step in steps]


def smoothed(curve: Sequence[Point]) -> list[Point]:
    if len(curve) < 3:
        return list(curve)
    return list(zip([x for x, _ in curve], smooth([y for _, y in curve]), strict=True))


def overlaid(ranking: Ranking) -> str | None:
    """An ``<svg>``: a line a configuration, the mean over its seeds, the best named; None where there is none."""
    courses = {id(row.group): [course(run.folder) for run in row.group.runs.values()] for row in ranking.rows}
    held_out = all(len(one.held_out) > 2 for found in courses.values() for one in found)

    def curve(group: Group) -> list[Point]:
        found = courses[id(group)]
        lines = [one.held_out if held_out else smoothed(one.training) for one in found]
        return thinned(averaged(lines), buckets=150)

    lines = [(place, curve(row.group)) for place, row in enumerate(ranking.rows)]
    drawn = [(place, line) for place, line in lines if len(line) > 1]
    if not drawn:
        return None
    title = "Held-out loss over training" if held_out else "Training loss, smoothed"
    return chart(ranking, drawn, title)


def chart(ranking: Ranking, lines: Sequence[tuple[int, list[Point]]], title: str) -> str:
    named = [place for place, _ in lines[:NAMED]]
    legend, top = names(ranking, named)
    ended, _ = plot.telling([line[-1][1] for _, line in lines], higher=False)
    kept = [loss for _, line in lines if line[-1][1] <= max(ended) for _, loss in line]
    x, y = plot.linear([step for _, line in lines for step, _ in line], about=10, margin=0), plot.linear(kept, about=7)
    frame = Frame(plot.room(y), WIDTH - 46, top + 30, HEIGHT - 44 + top - 25, (min(x.low, 0), y.low), (x.high, y.high))
    parts = [
        legend,
        text(16, top + 18, "nats per target token", plot.MUTED),
        plot.grid(frame, y),
        plot.below(frame, x, "step"),
    ]
    parts += [path(ranking, place, line, named, frame) for place, line in reversed(lines)]
    parts += ends([(frame.y(line[-1][1]), frame.x(line[-1][0]), place) for place, line in lines[:NAMED]], named)
    return picture(title, WIDTH, HEIGHT + top - 25, parts, PAGE)


def ends(at: Sequence[tuple[float, float, int]], named: Sequence[int]) -> list[str]:
    """The numbers of the named lines where they end, moved up as far as they would touch."""
    drawn, last = [], math.inf
    for y, x, place in sorted(at, reverse=True):
        last = min(y + 4, last - 13)
        drawn.append(text(x + 7, last, f"#{place + 1}", plot.HUES[named.index(place)], 'font-weight="600"'))
    return drawn


def path(ranking: Ranking, place: int, line: Sequence[Point], named: Sequence[int], frame: Frame) -> str:
    drawn = "M" + "L".join(f"{frame.x(step):.1f} {frame.y(loss):.1f}" for step, loss in line)
    label = ranking.rows[place].group.label(ranking.keys) or "run"
    style = f'stroke="{plot.MUTED}" stroke-width="1" stroke-opacity="{max(0.12, 8 / (len(ranking.rows) + 12)):.2f}"'
    if place in named:
        index = named.index(place)
        style = f'stroke="{plot.HUES[index]}" stroke-width="2.2" stroke-dasharray="{DASHES[index]}"'
    said = safe(f"#{place + 1} {label}\nends at {line[-1][1]:.3f}")
    return f'<path class="lr-line" d="{drawn}" fill="none" {style} stroke-linejoin="round"><title>{said}</title></path>'


def names(ranking: Ranking, places: Sequence[int]) -> tuple[str, float]:
    """The best ones' lines with their names, in rows below the title, and where they end."""
    x, y, parts = 16.0, 48.0, []
    for index, place in enumerate(places):
        label = shown.name(ranking.keys, ranking.rows[place].group)
        label = f"#{place + 1} {label if len(label) <= 60 else label[:59] + '…'}"
        wide = 50 + plot.CHARACTER * len(label)
        if x > 16 and x + wide > WIDTH:
            x, y = 16.0, y + 20
        dash = f'stroke="{plot.HUES[index]}" stroke-width="2.2" stroke-dasharray="{DASHES[index]}"'
        parts.append(f'<path d="M{x:.1f} {y - 4:.1f}h26" {dash}/>' + text(x + 33, y, label, plot.MUTED))
        x += wide
    if len(ranking.rows) > len(places):
        parts.append(text(x + 4, y, "others grey", plot.MUTED) if x + 90 < WIDTH else "")
    return "".join(parts), y
