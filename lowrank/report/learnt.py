"""What a run's adapters did to the weights, from ``spectra.json``: how far each moved and in how many directions, layer
by layer, and the singular values of a few sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.report import svg
from lowrank.report.curves import Series
from lowrank.report.figures import clean, fixed, mapping, number, short
from lowrank.report.ranks import label, picture, pointer, room, strength
from lowrank.report.svg import PAGE, Theme, text

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
        said.append(f"{len(others)} adapters are no change of a weight ({', '.join(methods)[:200]}).")
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


def grid(
    sites: Sequence[Site], title: str, value: Callable[[Site], float | None], width: int = 1072, theme: Theme = PAGE
) -> str:
    """A row a part, a column a layer, each cell as strong as its value; empty where no site has one."""
    shown = [(one, worth) for one in sites if (worth := value(one)) is not None]
    if not shown:
        return ""
    most = max(worth for _, worth in shown) or 1.0
    parts = list(dict.fromkeys(one.part for one, _ in shown))
    layers = sorted({one.layer for one, _ in shown if one.layer is not None}) or [0]
    left, top, high = room([(part, []) for part in parts]), 62.0, 24.0
    wide = min(44.0, (width - 20 - left) / len(layers))
    column = {layer: left + wide * place for place, layer in enumerate(layers)}
    row = {part: top + high * place for place, part in enumerate(parts)}
    every = max(1, -(-26 // max(1, int(wide))))  # a label of three digits takes 26 pixels
    drawn = [
        text(column[layer] + wide / 2, top - 8, str(layer), theme.muted, 'text-anchor="middle"')
        for layer in layers[::every]
    ]
    drawn += [text(left - 8, row[p] + high / 2 + 4, label(p), theme.muted, 'text-anchor="end"') for p in parts]
    for one, worth in shown:
        x = left if one.layer is None else column[one.layer]
        drawn.append(cell(x, row[one.part], wide, high, worth, most, theme))
        drawn.append(pointer(x, row[one.part], wide, high, story(one)))
    return picture(title, width, top + high * len(parts) + 14, drawn, theme)


def cell(x: float, y: float, wide: float, high: float, worth: float, most: float, theme: Theme) -> str:
    figure = fixed(worth, 1 if worth < 99.5 else 0)
    said = text(x + wide / 2, y + high / 2 + 4, figure, theme.ink, 'text-anchor="middle" font-size="11"')
    return (
        f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{max(wide - 2, 1):.1f}" height="{high - 2:.1f}" rx="3" '
        f'fill="{theme.hues[0]}" fill-opacity="{0.6 * strength(worth, most):.3f}"/>'
    ) + (said if wide >= 27 else "")


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
        series.append(Series(f"{named} ({short(one.change)})", list(range(1, len(heights) + 1)), heights))
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
