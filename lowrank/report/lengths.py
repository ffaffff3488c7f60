"""How long the rows of a run's data are: a histogram, those to train on as bars, those held out as dots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lowrank.report.curves import labels, ticks
from lowrank.report.layers import picture, pointer
from lowrank.report.svg import PAGE, text

TRAIN, HELD_OUT = "to train on", "held out"
WIDE, HIGH = 520, 335
LEFT, RIGHT, TOP, BOTTOM = 46.0, WIDE - 20.0, 62.0, HIGH - 42.0  # of the plot, in pixels


@dataclass(frozen=True)
class Scale:
    width: float  # tokens of a bar
    bars: int
    top: float  # the highest share, in per cent

    @property
    def step(self) -> float:
        return (RIGHT - LEFT) / self.bars

    def x(self, tokens: float) -> float:
        return LEFT + tokens / self.width * self.step

    def tall(self, share: float) -> float:
        return share / self.top * (BOTTOM - TOP)


def draw(width: float, train: Sequence[float], held_out: Sequence[float]) -> Markup | None:
    """Of rows by length, bars of ``width`` tokens, each as a share of its side. None where there is nothing to show."""
    sides = {TRAIN: shares(train), HELD_OUT: shares(held_out)}
    scale = Scale(width, max(map(len, sides.values())), max((v for side in sides.values() for v in side), default=0.0))
    if width <= 0 or not scale.top:
        return None
    drawn = [
        text(16, TOP - 14, "% of rows", PAGE.muted),
        key([name for name, side in sides.items() if side]),
        axes(scale),
    ]
    for place in range(scale.bars):
        here = {name: side[place] for name, side in sides.items() if place < len(side) and side[place]}
        drawn += [mark(name, scale.x(place * width), scale.step, scale.tall(share)) for name, share in here.items()]
        if here:
            said = [f"{place * width + 1:.0f}–{(place + 1) * width:.0f} tokens"]
            said += [f"{share:.1f} % of the rows {name}" for name, share in here.items()]
            drawn.append(pointer(scale.x(place * width), TOP, scale.step, BOTTOM - TOP, "\n".join(said)))
    return Markup(picture("Tokens a row", WIDE, HIGH, drawn, PAGE))


def shares(counts: Sequence[float]) -> list[float]:
    """In per cent of all."""
    return [100 * count / sum(counts) for count in counts] if sum(counts) else []


def mark(name: str, x: float, step: float, tall: float, bottom: float = BOTTOM) -> str:
    if name == TRAIN:
        return (
            f'<rect x="{x + step * 0.08:.1f}" y="{bottom - tall:.1f}" width="{step * 0.84:.1f}" height="{tall:.1f}" '
            f'rx="1.5" fill="{PAGE.hues[0]}" fill-opacity=".75"/>'
        )
    where = f'cx="{x + step / 2:.1f}" cy="{bottom - tall:.1f}" r="4"'
    return f'<circle {where} fill="{PAGE.hues[1]}" stroke="{PAGE.ground}" stroke-width="1.5"/>'


def key(names: Sequence[str]) -> str:
    """The legend, at the upper right."""
    x, drawn = RIGHT + 8 - sum(30 + 6.6 * len(name) for name in names), ""
    for name in names:
        drawn += mark(name, x, 12, 11 if name == TRAIN else 6, bottom=26) + text(x + 18, 25, name, PAGE.muted)
        x += 30 + 6.6 * len(name)
    return drawn


def axes(scale: Scale) -> str:
    upright, flat = ticks(0.0, scale.top, 5), ticks(0.0, scale.bars * scale.width, 6, whole=True)
    drawn = ""
    for share, said in zip(upright, labels(upright), strict=True):
        y = BOTTOM - scale.tall(share)
        drawn += f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{PAGE.grid}"/>'
        drawn += text(LEFT - 8, y + 4, said, PAGE.muted, 'text-anchor="end"')
    for tokens, said in zip(flat, labels(flat), strict=True):
        drawn += text(scale.x(tokens), BOTTOM + 18, said, PAGE.muted, 'text-anchor="middle"')
    return drawn + text((LEFT + RIGHT) / 2, HIGH - 8, "tokens", PAGE.muted, 'text-anchor="middle"')
