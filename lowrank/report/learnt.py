"""What a run's adapters did to the weights, from ``spectra.json``: how far each moved and in how many directions, layer
by layer, and the singular values of a few sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.report import layers, svg
from lowrank.report.curves import Series
from lowrank.report.figures import clean, fixed, mapping, number, short
from lowrank.report.svg import PAGE

MOST = 4000  # sites on a page
CURVES = 5


@dataclass(frozen=True)
class Site:
    path: str
    part: str  # what it is in its layer: q_proj
    layer: int | None
    change: float  # ‖ΔW‖ / ‖W‖
    effective_rank: float | None
    stable_rank: float | None
    singular: tuple[float, ...]


def sites_of(spectra: dict[str, Any]) -> list[Site]:
    """The sites that ``spectra.json`` tells of, as far as it can be read."""
    models = spectra.get("models")
    first = mapping(models[0]) if isinstance(models, list) and models else {}
    rows = first.get("sites")
    found = [site(mapping(row)) for row in rows[:MOST]] if isinstance(rows, list) else []
    return [one for one in found if one is not None]


def notes_of(spectra: dict[str, Any]) -> list[str]:
    """What the adapters' figures are relative to, and what there are none of."""
    models = spectra.get("models")
    first = mapping(models[0]) if isinstance(models, list) and models else {}
    notes, others = first.get("notes"), first.get("others")
    said = [clean(note) for note in notes[:20]] if isinstance(notes, list) else []
    if isinstance(others, list) and others:
        methods = sorted({clean(mapping(other).get("method", "")) for other in others[:MOST]})
        are = "1 adapter is" if len(others) == 1 else f"{len(others)} adapters are"
        said.append(f"{are} no change of a weight ({', '.join(methods)[:200]}).")
    return said


def site(row: dict[str, Any]) -> Site | None:
    change, layer = positive(row.get("change")), positive(row.get("layer"))
    if change is None or (layer is not None and not layer.is_integer()):
        return None
    values = row.get("singular")
    singular = [positive(value) for value in values[:64]] if isinstance(values, list) else []
    return Site(
        path=clean(row.get("path", "")),
        part=clean(row.get("type", "")),
        layer=None if layer is None else int(layer),
        change=change,
        effective_rank=positive(row.get("effective_rank")),
        stable_rank=positive(row.get("stable_rank")),
        singular=tuple(value for value in singular if value is not None),
    )


def positive(value: object) -> float | None:
    found = number(value)
    return found if found is not None and found >= 0 else None


def draw(sites: Sequence[Site]) -> list[str]:
    """An ``<svg>`` each: changes, effective ranks, singular values; what has nothing to show is left out."""
    if not sites:
        return []
    changes = grid(sites, "‖ΔW‖ / ‖W‖ of each site, by layer, in per cent", lambda one: 100 * one.change)
    ranks = grid(sites, "Effective rank of ΔW of each site, by layer", lambda one: one.effective_rank)
    return [drawn for drawn in (changes, ranks, curves(sites)) if drawn]


def grid(sites: Sequence[Site], title: str, value: Callable[[Site], float | None]) -> str:
    """A row a part, a column a layer, each cell as strong as its value; empty where no site has one."""
    shown = [(one, worth) for one in sites if (worth := value(one)) is not None]
    digits = 2 if max((worth for _, worth in shown), default=0.0) < 9.995 else 1
    cells = [
        layers.Cell(one.part, one.layer, worth, fixed(worth, digits if worth < 99.5 else 0), story(one))
        for one, worth in shown
    ]
    return layers.draw(title, cells) if cells else ""


def story(one: Site) -> str:
    """What the pointer reads: ``model.layers.0.mlp.up_proj``, and its figures below."""
    figures = [
        f"‖ΔW‖/‖W‖ {short(one.change)}",
        *([f"effective rank {one.effective_rank:.2f}"] if one.effective_rank is not None else []),
        *([f"stable rank {one.stable_rank:.2f}"] if one.stable_rank is not None else []),
        *([f"σ {', '.join(short(value) for value in one.singular[:4])} …"] if one.singular else []),
    ]
    return "\n".join([one.path, *figures])


def curves(sites: Sequence[Site]) -> str:
    """The singular values, over the largest, of the sites that changed most and least, and of some between."""
    ordered = sorted((one for one in sites if one.singular and one.singular[0] > 0), key=lambda one: -one.change)
    if not ordered:
        return ""
    places = sorted({round(share * (len(ordered) - 1) / (CURVES - 1)) for share in range(CURVES)})
    series = []
    for one in (ordered[place] for place in places):
        named = one.part if one.layer is None else f"{one.part} {one.layer}"
        heights = [value / one.singular[0] for value in one.singular]
        series.append(Series(f"{named} ({fixed(100 * one.change, 2)} %)", list(range(1, len(heights) + 1)), heights))
    return svg.chart(
        series,
        title="Singular values of ΔW, from the site that changed most to the one that did least (‖ΔW‖/‖W‖)",
        x_label="i",
        y_label="σᵢ / σ₁",
        width=1072,
        height=320,
        y_floor=0.0,
        theme=PAGE,
    )
