"""The curves of one run: which there are, and how each is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lowrank.report import learnt, ranks, svg
from lowrank.report.curves import Series, smooth, smoothing
from lowrank.report.figures import evaluation, mapping, number
from lowrank.report.recorded import Recorded


@dataclass(frozen=True)
class Charts:
    """Each is an inline ``<svg>``; loss is drawn twice because text in a scaled chart is too small for a phone."""

    wide: Markup | None
    narrow: Markup | None
    small: list[Markup]
    ranks: list[Markup]  # over time and the last; only where ranks moved
    learnt: list[Markup]  # what the adapters did to the weights
    smoothing: str  # the standard deviation of the smoothed curves, in steps


def draw(run: Recorded, config: dict[str, Any]) -> Charts:
    """Every curve that has something to show."""
    loss = _loss(run)
    small = [
        ("Learning rate", _rate(run)),
        ("Gradient norm", _norm(run, config)),
        ("Tokens/s", _trained(run, "tokens_per_s", hue=2)),
    ]
    return Charts(
        wide=_loss_chart(loss, 1072, 400) if loss else None,
        narrow=_loss_chart(loss, 380, 330) if loss else None,
        small=[_small_chart(series, title) for title, series in small if series],
        ranks=_ranks(run),
        learnt=[Markup(drawn) for drawn in learnt.draw(learnt.sites_of(run.spectra))],
        smoothing=f"{smoothing(len(run.steps)):.2g}" if len(run.steps) > 2 else "",
    )


def _ranks(run: Recorded) -> list[Markup]:
    found = ranks.ranks_of(run.ranks)
    if found is None:
        return []
    last = number(run.summary.get("steps")) or 0.0
    return [Markup(ranks.over_time(found, last)), Markup(ranks.final(found))]


def _loss_chart(series: Sequence[Series], width: int, height: int) -> Markup:
    drawn = svg.chart(
        series,
        title="Loss",
        x_label="step",
        y_label="nats per target token",
        width=width,
        height=height,
        theme=svg.PAGE,
    )
    return Markup(drawn)


def _small_chart(series: Sequence[Series], title: str) -> Markup:
    drawn = svg.chart(series, title=title, x_label="step", width=346, height=230, y_floor=0.0, theme=svg.PAGE)
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
    raw = Series("", *run.column("loss"), "thin")
    marks = {row["step"] for row in run.steps if row.get("spike") is True}
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
    raw = "training" if column == "loss" else "each step"
    return [Series(raw, xs, ys, "thin", hue), Series("smoothed", xs, smooth(ys), "line", hue)]


def _rate(run: Recorded) -> list[Series]:
    xs, ys = run.column("lr")
    return [Series("", xs, ys, hue=3)] if xs else []


def _norm(run: Recorded, config: dict[str, Any]) -> list[Series]:
    """The norms, and where they were clipped if that line lies among them."""
    series = _trained(run, "grad_norm", hue=4)
    limit = number(mapping(config.get("loop")).get("max_grad_norm"))
    norms = [value for one in series for value in one.telling()]
    if not limit or not norms or limit > 1.5 * max(norms):
        return series
    xs = series[0].xs
    return [*series, Series(f"clip {limit:g}", [xs[0], xs[-1]], [limit, limit], "dashed", hue=5)]
