"""Line charts as SVG text, for a page (``theme=PAGE``) or a file of its own (``theme=PAPER``, the default).

No scripts: a column under the pointer shows its values through ``<title>``. A standalone file paints its own
white ground, so it reads the same on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from lowrank.report.curves import Series, labels, span, thinned, ticks
from lowrank.report.figures import clean, number, short

COLUMNS = 120  # that answer to the pointer: as fine as a hand can aim, and a small file
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Theme:
    ink: str
    muted: str
    grid: str
    ground: str  # around points, to lift them off the lines
    alarm: str
    hues: tuple[str, ...]
    border: str | None  # None: no background of its own


PAPER = Theme(
    ink="#1f2328",
    muted="#656d76",
    grid="#e7eaee",
    ground="#ffffff",
    alarm="#c4314b",
    hues=("#2f62d0", "#d2691e", "#1b8a72", "#8e4fae", "#b8860b", "#5b6770"),
    border="#d5dae0",
)
PAGE = Theme(
    ink="var(--ink, currentColor)",
    muted="var(--muted, #6d6a66)",
    grid="var(--line, #e4e0da)",
    ground="var(--card, #ffffff)",
    alarm="var(--bad, #c4314b)",
    hues=tuple(f"var(--hue-{place}, {colour})" for place, colour in enumerate(PAPER.hues)),
    border=None,
)


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis behind the curves, or a line across them where both ends are one."""

    name: str  # in the legend
    low: float
    high: float


@dataclass(frozen=True)
class Frame:
    """The plot's rectangle in pixels, and the values (x, y) at its lower left and upper right corners."""

    left: float
    right: float
    top: float
    bottom: float
    low: tuple[float, float]
    high: tuple[float, float]

    def x(self, value: float) -> float:
        share = (value - self.low[0]) / (self.high[0] - self.low[0])
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        share = (value - self.low[1]) / (self.high[1] - self.low[1])
        # What lies outside stays on the edge: one spike must not flatten the rest of the curve.
        return self.bottom - min(max(share, 0.0), 1.0) * (self.bottom - self.top)


def chart(
    series: Sequence[Series],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    width: int = 720,
    height: int = 320,
    y_floor: float | None = None,
    theme: Theme = PAPER,
    bands: Sequence[Band] = (),
) -> str:
    """An ``<svg>`` of all ``series`` on one pair of axes, valid XML by itself and inline in HTML.

    ``y_floor`` is where the y axis starts (0 for a rate); without it the axis fits the data. ``bands`` do not move it.
    """
    legend, below_legend = _legend(series, bands, title, width, theme)
    top = below_legend + (32 if y_label else 14)
    frame, y_ticks = _frame(series, width, top, height - (42 if x_label else 26), y_floor)
    middle = (frame.left + frame.right) / 2
    parts = [
        ground(width, height, theme),
        text(16, 25, title, theme.ink, 'font-size="14" font-weight="600"'),
        legend,
        text(16, top - 12, y_label, theme.muted),
        *(_band(one, frame, theme) for one in bands),
        _grid(frame, y_ticks, theme),
        _x_axis(frame, series, theme),
        text(middle, height - 8, x_label, theme.muted, 'text-anchor="middle"'),
        *(_marks(one, frame, _hue(one, place, theme), theme) for place, one in enumerate(series)),
        _columns(series, frame, x_label or "x"),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{safe(title or y_label)}" font-family="{FONT}" '
        f'font-size="12">\n' + "\n".join(part for part in parts if part) + "\n</svg>\n"
    )


def _frame(
    series: Sequence[Series], width: int, top: float, bottom: float, y_floor: float | None
) -> tuple[Frame, list[float]]:
    """The plot's rectangle, its left edge leaving room for the widest label; and the y ticks."""
    x_low, x_high = span([x for one in series for x, _ in one.points()], margin=0.0)
    x_low = 0.0 if 0 < x_low < 0.1 * x_high else x_low  # steps count from 1, axes from 0
    y_low, y_high = span([y for one in series for y in one.telling()], margin=0.06)
    if y_floor is not None:
        y_low, y_high = y_floor, (y_high if y_high > y_floor else y_floor + 1)
    y_ticks = ticks(y_low, y_high, about=max(4, (bottom - top) / 44))
    left = 26 + 6.8 * max((len(label) for label in labels(y_ticks)), default=1)
    return Frame(left, width - 20, top, bottom, (x_low, y_low), (x_high, y_high)), y_ticks


def _hue(one: Series, place: int, theme: Theme) -> str:
    return theme.hues[(place if one.hue is None else one.hue) % len(theme.hues)]


def safe(text: object) -> str:
    return escape(clean(text), quote=True)


def text(x: float, y: float, what: str, fill: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" {more}>{safe(what)}</text>' if what else ""


def ground(width: int, height: int, theme: Theme) -> str:
    style = "<style>.lr-column{fill:transparent}.lr-column:hover{fill:currentColor;fill-opacity:.1}</style>"
    if theme.border is None:
        return style
    return (
        f'{style}<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8" '
        f'fill="{theme.ground}" stroke="{theme.border}"/>'
    )


def _legend(series: Sequence[Series], bands: Sequence[Band], title: str, width: int, theme: Theme) -> tuple[str, float]:
    """A sample of each named line, beside the title where all fit, else in rows below it; and where they end."""
    lines = [(one, _hue(one, place, theme)) for place, one in enumerate(series) if one.name]
    named: list[tuple[Series | Band, str]] = [*lines, *((one, "") for one in bands)]
    wide = {one.name: 44 + 6.2 * len(one.name) for one, _ in named}
    x, y = width - 8 - sum(wide[one.name] for one, _ in named), 25.0
    if x < 40 + 8 * len(title):
        x, y = 16.0, 47.0 if title else 25.0
    parts = []
    for one, hue in named:
        if x > 16 and x + wide[one.name] > width:
            x, y = 16.0, y + 20
        swatch = Frame(x, x + 18, y - 9, y + 1, (0, 0), (1, 1))
        parts.append(_sample(one, swatch, hue, theme))
        parts.append(text(x + 24, y, one.name, theme.muted))
        x += wide[one.name]
    return "".join(parts), y if named or title else 8.0


def _sample(one: Series | Band, swatch: Frame, hue: str, theme: Theme) -> str:
    if isinstance(one, Band):
        return _band(Band("", 0.0, 1.0) if one.low < one.high else Band("", 0.5, 0.5), swatch, theme)
    xs = [0.5] if one.style == "points" else [0.0, 1.0]
    return _marks(Series("", xs, [0.5] * len(xs), one.style), swatch, hue, theme)


def _band(one: Band, frame: Frame, theme: Theme) -> str:
    low, high = (frame.x(min(max(x, frame.low[0]), frame.high[0])) for x in (one.low, one.high))
    top, height = f"{frame.top:.1f}", f"{frame.bottom - frame.top:.1f}"
    if one.low < one.high:
        return (
            f'<rect class="lr-band" x="{low:.1f}" y="{top}" width="{high - low:.1f}" height="{height}" '
            f'fill="{theme.muted}" fill-opacity=".1"/>'
        )
    return f'<path d="M{low:.1f} {top}v{height}" stroke="{theme.muted}" stroke-width="1.5" stroke-dasharray="2 3"/>'


def _grid(frame: Frame, values: list[float], theme: Theme) -> str:
    ends = f'x1="{frame.left:.1f}" x2="{frame.right:.1f}"'
    parts = []
    for value, label in zip(values, labels(values), strict=True):
        y = frame.y(value)
        parts.append(f'<line {ends} y1="{y:.1f}" y2="{y:.1f}" stroke="{theme.grid}"/>')
        parts.append(text(frame.left - 8, y + 4, label, theme.muted, 'text-anchor="end"'))
    return "".join(parts)


def _x_axis(frame: Frame, series: Sequence[Series], theme: Theme) -> str:
    whole = all(float(x).is_integer() for one in series for x, _ in one.points())
    values = ticks(frame.low[0], frame.high[0], about=(frame.right - frame.left) / 90, whole=whole)
    line = (
        f'<line x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{frame.bottom:.1f}" '
        f'y2="{frame.bottom:.1f}" stroke="{theme.muted}" stroke-opacity=".5"/>'
    )
    texts = zip(values, labels(values), strict=True)
    return line + "".join(
        text(frame.x(value), frame.bottom + 18, label, theme.muted, 'text-anchor="middle"') for value, label in texts
    )


_STROKES = {
    "line": 'stroke-width="2.2"',
    "thin": 'stroke-width="1" stroke-opacity=".45"',
    "dashed": 'stroke-width="1.5" stroke-dasharray="5 4"',
    "points": 'stroke-width="1.3" stroke-opacity=".75"',
}


def _marks(one: Series, frame: Frame, colour: str, theme: Theme) -> str:
    """The line, its points (where the style has them, or a point stands alone), a cross for each lost value."""
    runs = [thinned(run, buckets=int(frame.right - frame.left)) for run in one.runs()]
    parts = [_path(run, frame) for run in runs if len(run) > 1]
    faint = ' opacity=".6"' if one.style == "thin" and sum(map(len, runs)) > 400 else ""  # it fills an area
    line = f'<path d="{"".join(parts)}" fill="none" stroke="{colour}" {_STROKES[one.style]}{faint} ' if parts else ""
    dots = [point for run in runs if one.style == "points" or len(run) == 1 for point in run]
    size = 4 if len(dots) <= 40 else 1.8  # many points must not hide the curve they lie on
    lost = [x for x, y in one.points() if number(y) is None]
    return "".join(
        [
            line and line + 'stroke-linejoin="round" stroke-linecap="round"/>',
            *(
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{size}" fill="{colour}" '
                f'stroke="{theme.ground}" stroke-width="{1.5 if size == 4 else 0}"/>'
                for x, y in dots
            ),
            *(
                f'<path d="M{frame.x(x) - 4:.1f} {frame.top - 4:.1f}l8 8m0 -8l-8 8" '
                f'stroke="{theme.alarm}" stroke-width="1.8"/>'
                for x in lost[:COLUMNS]
            ),
        ]
    )


def _path(run: Sequence[tuple[float, float]], frame: Frame) -> str:
    return "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in run)


def _columns(series: Sequence[Series], frame: Frame, x_label: str) -> str:
    """Invisible columns, at each point of a ``points`` series and evenly between, that name the values there."""
    values: dict[float, list[str]] = {}
    for one in series:
        for x, y in one.points():
            values.setdefault(x, []).append(f"{one.name or 'value'} {short(y)}")
    places = sorted(values)
    stride = max(1, len(places) // COLUMNS)
    marked = {x for one in series if one.style == "points" for x, _ in one.points()}
    places = [x for index, x in enumerate(places) if index % stride == 0 or x in marked]
    edges = [frame.left, *(frame.x((a + b) / 2) for a, b in pairwise(places)), frame.right]
    return "".join(
        f'<rect class="lr-column" x="{left:.1f}" y="{frame.top:.1f}" width="{right - left:.1f}" '
        f'height="{frame.bottom - frame.top:.1f}"><title>{safe(f"{x_label} {short(x)}")}\n'
        f"{safe(chr(10).join(values[x]))}</title></rect>"
        for x, left, right in zip(places, edges, edges[1:], strict=False)
    )
