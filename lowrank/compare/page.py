"""``sweep.html``: many runs on one page that needs no network and no other file, and is readable without its script."""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lowrank.compare import cells, curves, effects, notes, parallel, plot, shown, summary, tradeoff
from lowrank.compare.explain import Effect, together
from lowrank.compare.explain import effect as effect_of
from lowrank.compare.explain import effects as effects_of
from lowrank.compare.found import Found
from lowrank.compare.ranking import Ranking
from lowrank.disk import write_text
from lowrank.errors import ConfigError, did_you_mean
from lowrank.record.directory import REPORT
from lowrank.report import run as report
from lowrank.report.figures import MISSING, clean

HERE = Path(__file__).parent
MOST = 9  # keys that have a chart of their own
OPEN = 40  # runs that are listed unfolded


@dataclass(frozen=True)
class Plots:
    """Each an inline ``<svg>``; what has nothing to show is absent."""

    effects: list[Markup]
    heat: Markup | None
    parallel: Markup | None
    tradeoffs: list[Markup]
    curves: Markup | None


def write_page(ranking: Ranking, path: Path, heat: tuple[str, ...] = ()) -> Path:
    """The page, whole or not at all; ``heat`` names the two keys of the heat map. Raises ConfigError for a key that
    does not differ."""
    return write_text(path, page(ranking, path.parent, heat))


def page(ranking: Ranking, folder: Path, heat: tuple[str, ...] = ()) -> str:
    """The whole page as text; links to the runs' reports go from ``folder``."""
    environment = Environment(
        loader=FileSystemLoader([HERE, Path(report.__file__).parent / "page"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (HERE / "sort.js").read_text(encoding="utf-8")
    found = effects_of(ranking.results.groups, ranking.keys, ranking.quality)
    return environment.get_template("sweep.html.j2").render(
        script=Markup(script.rstrip("\n")),
        digest=hashed(script),
        title=summary.title(ranking),
        folder=clean(
            os.path.commonpath([os.path.dirname(os.path.abspath(run.folder)) for run in ranking.results.runs])
        ),
        states=summary.states(ranking.results),
        cards=summary.cards(ranking, found),
        broken=[(run.name, run.status, run.cause) for run in ranking.results.broken],
        columns=cells.columns(ranking),
        rows=cells.rows(ranking),
        notes=list(notes.about(ranking)),
        off=off_axis(ranking),
        plots=plots(ranking, found, heat),
        quality=shown.label(ranking.quality),
        runs=[listed(ranking, run, folder) for run in ranking.results.runs],
        run_metrics=[shown.label(metric) for metric in ranking.metrics],
        over=[clean(key) for key in ranking.results.over],
        unfolded=len(ranking.results.runs) <= OPEN,
    )


def hashed(script: str) -> str:
    """What the page's Content-Security-Policy allows: this script and no other."""
    return base64.b64encode(hashlib.sha256(script.rstrip("\n").encode()).digest()).decode()


def plots(ranking: Ranking, found: list[Effect], heat: tuple[str, ...]) -> Plots:
    if len(ranking.rows) < 2:
        one = curves.overlaid(ranking) if ranking.rows else None
        return Plots([], None, None, [], Markup(one) if one else None)
    measured = [row for row in ranking.rows if row.estimates[ranking.quality]]
    pair = heat_keys(ranking, found, heat)
    made = curves.overlaid(ranking)
    tradeoffs = [tradeoff.tradeoff(ranking, cost) for cost in ranking.costs]
    return Plots(
        effects=[Markup(effects.main_effect(ranking, one)) for one in found[:MOST]] if measured else [],
        heat=Markup(effects.heat_map(ranking, *pair)) if pair and measured else None,
        parallel=Markup(parallel.parallel(ranking, found)) if len(found) > 1 and measured else None,
        tradeoffs=[Markup(one) for one in tradeoffs if one],
        curves=Markup(made) if made else None,
    )


def heat_keys(ranking: Ranking, found: list[Effect], heat: tuple[str, ...]) -> tuple[Effect, Effect] | None:
    """The two asked for, or the two that together explain most, the one with more values across."""
    for key in heat:
        if key not in ranking.results.differing:
            there = ranking.results.differing
            raise ConfigError(
                f"--heat {key}: not a key that differs.{did_you_mean(key, there)} There are: {', '.join(there)}."
            )
    if heat:
        across, down = (effect_of(ranking.results.groups, key, ranking.quality) for key in heat)
        return across, down
    if len(found) < 2:
        return None
    pairs = list(combinations(found[:MOST], 2))
    down, across = max(pairs, key=lambda pair: together(ranking.results.groups, pair[0], pair[1], ranking.quality))
    return (across, down) if len(across.levels) >= len(down.levels) else (down, across)


def off_axis(ranking: Ranking) -> int:
    """How many groups the charts draw on their edge."""
    known = [found.mean for row in ranking.rows if (found := row.estimates[ranking.quality])]
    return plot.telling(known, ranking.higher(ranking.quality))[1] if known else 0


def listed(ranking: Ranking, run: Found, folder: Path) -> dict[str, Any]:
    """One line of the list of all runs."""
    report = run.folder / REPORT
    seeds = [clean(run.keys.get(key, MISSING)) for key in ranking.results.over]
    figures = [shown.formatted(metric)(run.metric(metric)) for metric in ranking.metrics] if run.done else []
    place = next((n for n, row in enumerate(ranking.rows, start=1) if run in row.group.runs.values()), None)
    return {
        "name": run.name,
        "link": f"./{quote(os.path.relpath(report, folder))}" if report.is_file() else "",
        "status": run.status,
        "place": f"#{place}" if place else "",
        "seeds": seeds,
        "figures": figures or [MISSING] * len(ranking.metrics),
    }
