"""The curves of one run: which there are, and how each is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lowrank.report import learnt, lr_range, ranks, svg
from lowrank.report.curves import Series, smooth, smoothing, telling_places
from lowrank.report.figures import evaluation, mapping, number
from lowrank.report.gap import Gap
from lowrank.report.recorded import Recorded
from lowrank.report.svg import Band

FULL, BESIDE, SMALL = (1072, 400), (710, 330), (346, 230)  # pixels of a chart: a row's, two thirds', a third's
PHONE = (346, 320)


@dataclass(frozen=True)
class Charts:
    """Each is an inline ``<svg>``; loss is drawn twice because text in a scaled chart is too small for a phone."""

    wide: Markup | None
    narrow: Markup | None
    beside: Markup | None  # what stands beside ``wide``, which leaves room for it: a range test, or the overfit gap
    small: list[Markup]
    ranks: list[Markup]  # over time and the last; only where ranks moved
    learnt: list[Markup]  # what the adapters did to the weights
    smoothing: str  # the standard deviation of the smoothed curves, in steps


def draw(run: Recorded, config: dict[str, Any], gap: Gap | None) -> Charts:
    """Every curve that has something to show."""
    loss, warm = _loss(run), _warm_up(run, config)
    found = [*lr_range.charts(run.steps, config), *([_gap_chart(gap)] if gap and gap.is_curve else [])]
    bands = [*warm, *_resumed(run)]
    small = [
        ("Learning rate", _rate(run), warm),
        ("Gradient norm", _norm(run, config), []),
        ("Tokens/s", _trained(run, "tokens_per_s", hue=2), []),
    ]
    return Charts(
        wide=_loss_chart(loss, bands, BESIDE if found else FULL) if loss else None,
        narrow=_loss_chart(loss, bands, PHONE) if loss else None,
        beside=found[0] if found else None,
        small=[_small_chart(series, title, bands) for title, series, bands in small if series],
        ranks=_ranks(run),
        learnt=[Markup(drawn) for drawn in learnt.draw(learnt.sites_of(run.spectra))],
        smoothing=f"{smoothing(len(run.steps)):.2g}" if len(run.steps) > 2 else "",
    )


def warm_up(warmup: float, total: float) -> int:
    """Steps of warm-up: ``schedule.warmup`` itself, or below 1 a fraction of all steps."""
    return round(warmup * total) if warmup < 1 else int(warmup)


def _warm_up(run: Recorded, config: dict[str, Any]) -> list[Band]:
    wanted = number(mapping(config.get("schedule")).get("warmup"))
    known = mapping(run.identity.get("identity")).get("steps")
    total = number(known) or number(mapping(config.get("loop")).get("steps")) or 0.0
    steps = warm_up(wanted, total) if wanted and wanted > 0 else 0
    return [Band(f"warm-up ({steps} step{'s' if steps > 1 else ''})", 0, steps)] if steps else []


def _resumed(run: Recorded) -> list[Band]:
    """A line where each process of the run but the first went on."""
    after = [number(told.get("after_step")) for told in run.processes]
    last = run.steps[-1]["step"] if run.steps else 0
    return [Band("resumed", step, step) for step in sorted({s for s in after if s and s <= last})[:20]]


def _ranks(run: Recorded) -> list[Markup]:
    found = ranks.ranks_of(run.ranks)
    if found is None:
        return []
    last = number(run.summary.get("steps")) or 0.0
    return [Markup(ranks.over_time(found, last)), Markup(ranks.final(found))]


def _loss_chart(series: Sequence[Series], bands: Sequence[Band], size: tuple[int, int]) -> Markup:
    drawn = svg.chart(
        series,
        title="Loss",
        x_label="step",
        y_label="nats per target token",
        width=size[0],
        height=size[1],
        theme=svg.PAGE,
        bands=bands,
    )
    return Markup(drawn)


def _gap_chart(gap: Gap) -> Markup:
    zero = Series("", [gap.steps[0], gap.steps[-1]], [0.0, 0.0], "dashed", hue=5)
    line = Series("held-out less training", gap.steps, gap.values, "points", hue=3)
    drawn = svg.chart(
        [zero, line],
        title="Overfit gap",
        x_label="step",
        y_label="nats per target token",
        width=SMALL[0],
        height=BESIDE[1],
        theme=svg.PAGE,
    )
    return Markup(drawn)


def _small_chart(series: Sequence[Series], title: str, bands: Sequence[Band]) -> Markup:
    wide, high = SMALL
    drawn = svg.chart(
        series, title=title, x_label="step", width=wide, height=high, y_floor=0.0, theme=svg.PAGE, bands=bands
    )
    return Markup(drawn)


def _loss(run: Recorded) -> list[Series]:
    points = {row["step"]: row.get("loss") for row in run.evals}
    # The base's evaluation may come from a cache and the last one from after the last step: neither is a row.
    for end, when in ((0, "before"), (run.summary.get("steps"), "after")):
        found = evaluation(run.summary, when)
        if (step := number(found.get("step", end))) is not None:
            points.setdefault(step, found.get("loss"))
    known = [(step, _value(loss)) for step, loss in sorted(points.items()) if loss is not None]
    held_out = Series("held-out", [step for step, _ in known], [loss for _, loss in known], "points", hue=1)
    return _trained(run, "loss", hue=0) + ([held_out] if known else []) + _spikes(run)


def _spikes(run: Recorded) -> list[Series]:
    """A mark on each step whose loss stood out, none above what the axis holds."""
    marks = {row["step"] for row in run.steps if row.get("spike") is True}
    if not marks:
        return []
    raw = Series("", *run.column("loss"), "thin")
    xs = [x for x, _ in raw.points() if x in marks]
    top = max(raw.telling(), default=0.0)
    ys = [min(y, top) for x, y in raw.points() if x in marks]
    return [Series("spike", xs, ys, "points", hue=5)] if xs else []


def _value(loss: object) -> float:
    found = number(loss)
    return math.nan if found is None else found


def _trained(run: Recorded, column: str, hue: int) -> list[Series]:
    """The raw curve, thin, and its smoothed one over it; one or two points are only themselves."""
    xs, ys = run.column(column)
    if not xs:
        return []
    if len(xs) < 3:
        return [Series("training" if column == "loss" else "", xs, ys, hue=hue)]
    name = "training" if column == "loss" else "each step"
    places = telling_places(ys)
    raw = Series(name, [xs[place] for place in places], [ys[place] for place in places], "thin", hue)
    return [raw, Series("smoothed", raw.xs, smooth(ys, at=places), "line", hue)]


def _rate(run: Recorded) -> list[Series]:
    xs, ys = run.column("lr")
    places = telling_places(ys)
    return [Series("", [xs[place] for place in places], [ys[place] for place in places], hue=3)] if xs else []


def _norm(run: Recorded, config: dict[str, Any]) -> list[Series]:
    """The norms, and where they were clipped if that line lies among them."""
    series = _trained(run, "grad_norm", hue=4)
    limit = number(mapping(config.get("loop")).get("max_grad_norm"))
    norms = [value for one in series for value in one.telling()]
    xs = series[0].xs if series else []
    if not limit or not norms or len(xs) < 2 or limit > 1.5 * max(norms):
        return series
    return [*series, Series(f"clip {limit:g}", [xs[0], xs[-1]], [limit, limit], "dashed", hue=5)]
