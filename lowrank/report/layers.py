"""A picture of all sites at once: a row for each part of a layer, a column for each layer, a figure in each cell.

Drawn in one hue whose strength is the figure, over whatever ground there is: it reads the same on a light and on a
dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank.report.svg import FONT, PAGE, Theme, ground, safe, text

LABEL, CHARACTER = 16, 6.6  # pixels: the least room left of the labels, and a letter's width
LONGEST = 32  # characters of a label
WIDEST, HIGH, TOP = 44.0, 24.0, 62.0  # pixels: of a cell, and where the first row begins


@dataclass(frozen=True)
class Cell:
    part: str  # what the site is in its layer: self_attn.q_proj
    layer: int | None  # None: the site lies in no layer, and is drawn in the first column
    worth: float
    figure: str  # worth, as it is shown where there is room
    story: str  # what the pointer reads


def draw(title: str, cells: Sequence[Cell], width: int = 1072, theme: Theme = PAGE) -> str:
    """An ``<svg>``, its parts in the order in which they come first."""
    parts = list(dict.fromkeys(cell.part for cell in cells))
    layers = sorted({cell.layer for cell in cells if cell.layer is not None}) or [0]
    most = max((cell.worth for cell in cells), default=0.0) or 1.0
    left = room(parts)
    wide = min(WIDEST, (width - 20 - left) / len(layers))
    column = {layer: left + wide * place for place, layer in enumerate(layers)}
    row = {part: TOP + HIGH * place for place, part in enumerate(parts)}
    every = max(1, -(-26 // max(1, int(wide))))  # a label of three digits takes 26 pixels
    drawn = [
        text(column[layer] + wide / 2, TOP - 8, str(layer), theme.muted, 'text-anchor="middle"')
        for layer in layers[::every]
    ]
    drawn += [text(left - 8, row[part] + HIGH / 2 + 4, label(part), theme.muted, 'text-anchor="end"') for part in parts]
    for cell in cells:
        x = left if cell.layer is None else column[cell.layer]
        drawn.append(
            square(cell, x, row[cell.part], wide, most, theme) + pointer(x, row[cell.part], wide, HIGH, cell.story)
        )
    return picture(title, width, TOP + HIGH * len(parts) + 14, drawn, theme)


def square(cell: Cell, x: float, y: float, wide: float, most: float, theme: Theme) -> str:
    middle = 'text-anchor="middle" font-size="11"'
    fits = wide >= CHARACTER * len(cell.figure) + 0.6
    return (
        f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{max(wide - 2, 1):.1f}" height="{HIGH - 2:.1f}" rx="3" '
        f'fill="{theme.hues[0]}" fill-opacity="{0.6 * strength(cell.worth, most):.3f}"/>'
    ) + (text(x + wide / 2, y + HIGH / 2 + 4, cell.figure, theme.ink, middle) if fits else "")


def strength(worth: float, most: float) -> float:
    """Of the hue: nothing for 0, and the least worth still to be seen."""
    return 0.08 + 0.92 * worth / most if worth else 0.0


def pointer(x: float, y: float, width: float, height: float, said: str) -> str:
    """An invisible rectangle that shows ``said`` under the pointer."""
    return (
        f'<rect class="lr-column" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{safe(said)}</title></rect>"
    )


def label(part: str) -> str:
    return part if len(part) <= LONGEST else f"…{part[1 - LONGEST :]}"


def room(parts: Sequence[str]) -> float:
    """The pixels that the labels take on the left."""
    return LABEL + CHARACTER * max((len(label(part)) for part in parts), default=0) + 8


def picture(title: str, width: int, height: float, drawn: Sequence[str], theme: Theme) -> str:
    """A chart's frame and heading around what is drawn."""
    heading = text(16, 25, title, theme.ink, 'font-size="14" font-weight="600"')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" '
        f'height="{height:.0f}" role="img" aria-label="{safe(title)}" font-family="{FONT}" font-size="12">\n'
        + "\n".join([ground(width, round(height), theme), heading, *drawn])
        + "\n</svg>\n"
    )
