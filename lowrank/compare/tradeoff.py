"""Quality against a cost: every group a dot, those that nothing beats joined and numbered as in the table."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.compare import plot, shown
from lowrank.compare.ranking import Ranking, Row
from lowrank.compare.student import Estimate
from lowrank.report.ranks import picture
from lowrank.report.svg import PAGE, Frame, safe, text

WIDTH, HEIGHT = 346, 290
APART = 13.0  # pixels between two numbers that can be read


def tradeoff(ranking: Ranking, cost: str) -> str | None:
    """An ``<svg>``; None where all groups cost the same."""
    points = [
        (number, row, row.estimates[cost], row.estimates[ranking.quality])
        for number, row in enumerate(ranking.rows, start=1)
    ]
    known = [(number, row, c, q) for number, row, c, q in points if c is not None and q is not None]
    if len({c.mean for _, _, c, _ in known}) < 2:
        return None
    higher = ranking.higher(ranking.quality)
    kept, _ = plot.telling([q.mean for *_, q in known], higher)
    ends = [
        end
        for _, row, _, q in known
        if cost in row.fronts and q.mean in kept
        for end in (q.low, q.high)
        if end is not None
    ]
    y, x = (
        plot.linear(kept + plot.telling(kept + ends, higher)[0], about=7),
        plot.sizes([c.mean for _, _, c, _ in known], cost, about=4),
    )
    frame = Frame(plot.room(y), WIDTH - 18, 52, HEIGHT - 48, (x.low, y.low), (x.high, y.high))
    placed = [(number, row, frame.x(x.at(c.mean)), q) for number, row, c, q in known]
    on = [one for one in placed if cost in one[1].fronts]
    drawn = [
        plot.grid(frame, y),
        plot.below(frame, x, shown.label(cost)),
        steps([(px, q.mean) for _, _, px, q in on], frame),
    ]
    drawn += [dot(ranking, one, cost, frame) for one in placed if one not in on]
    drawn += [dot(ranking, one, cost, frame) for one in on]
    drawn += numbers([(number, px, frame.y(q.mean)) for number, _, px, q in on], frame)
    return picture(f"Against {shown.label(cost)}", WIDTH, HEIGHT, drawn, PAGE)


def steps(points: Sequence[tuple[float, float]], frame: Frame) -> str:
    """The front as stairs: what is to be had for at most that cost."""
    order = sorted(points)
    if not order:
        return ""
    path = f"M{order[0][0]:.1f} {frame.y(order[0][1]):.1f}"
    path += "".join(f"H{x:.1f}V{frame.y(value):.1f}" for x, value in order[1:]) + f"H{frame.right:.1f}"
    return f'<path d="{path}" fill="none" stroke="{plot.HUES[0]}" stroke-width="1.6" stroke-opacity=".7"/>'


def dot(ranking: Ranking, one: tuple[int, Row, float, Estimate], cost: str, frame: Frame) -> str:
    number, row, x, quality = one
    on, y = cost in row.fronts, frame.y(quality.mean)
    off = not frame.low[1] <= quality.mean <= frame.high[1]
    bar = ""
    if on and quality.low is not None and quality.high is not None:
        ends = frame.y(quality.high), frame.y(quality.low)
        bar = f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{plot.HUES[0]}" stroke-width="4" '
        bar += 'stroke-opacity=".3"/>'
    paint = f'fill="{plot.HUES[0]}" stroke="{plot.CARD}"' if on else f'fill="{plot.MUTED}" fill-opacity=".4"'
    paint = f'fill="none" stroke="{PAGE.alarm}"' if off else paint
    form, unit = shown.formatted(ranking.quality), shown.formatted(cost)
    spent = row.estimates[cost]
    said = (
        f"#{number} {row.group.label(ranking.keys)}\n{shown.label(ranking.quality)} {form(quality.mean)}\n"
        f"{shown.label(cost)} {unit(spent.mean if spent else None)}"
    )
    return f'{bar}<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if on else 3.5}" {paint}><title>{safe(said)}</title></circle>'


def numbers(points: Sequence[tuple[int, float, float]], frame: Frame) -> list[str]:
    """Beside each dot of the front, where there is room for it."""
    taken: list[tuple[float, float]] = []
    drawn = []
    for number, x, y in sorted(points):
        right = x < frame.right - 24
        place = (x + 9 if right else x - 9, y - 7)
        if all(abs(place[0] - a) > 2 * APART or abs(place[1] - b) > APART for a, b in taken):
            taken.append(place)
            halo = f'paint-order="stroke" stroke="{plot.CARD}" stroke-width="3" font-weight="600"'
            drawn.append(text(*place, f"#{number}", plot.INK, f'{halo} text-anchor="{"start" if right else "end"}"'))
    return drawn
