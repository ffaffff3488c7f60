"""What a run was trained on, as ``data.json`` tells it: the data card, and rows token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lowrank.report import lengths
from lowrank.report.figures import MISSING, clean, fixed, mapping, number, percent

ROWS, PIECES = 10, 4000  # on a page at most
SETTINGS = ("template", "train_on", "max_length", "on_empty", "limit", "seed")


@dataclass(frozen=True)
class Run:
    """Tokens one after another that are all learnt, or all only read; or, without texts, a number left out."""

    target: bool
    pieces: list[str]
    left_out: str


@dataclass(frozen=True)
class Row:
    heading: str
    runs: list[Run]


@dataclass(frozen=True)
class Card:
    facts: list[tuple[str, str]]
    counts: list[tuple[str, str, str]]  # what, to train on, held out
    lengths: Markup | None
    notes: list[str]
    rows: list[Row]


def card(told: dict[str, Any], config: dict[str, Any]) -> Card | None:
    """None where nothing is known of the data."""
    sides = [mapping(told.get(name)) for name in ("train", "eval")]
    name, sha256 = clean(told.get("name") or ""), clean(told.get("sha256") or "")
    if not name and not any(sides):
        return None
    settings = mapping(config.get("data"))
    chosen = [(f"data.{key}", clean(settings[key])) for key in SETTINGS if settings.get(key) is not None]
    notes, shown = told.get("notes"), told.get("shown")
    return Card(
        facts=[*([("name", name)] if name else []), *([("sha256", sha256)] if sha256 else []), *chosen],
        counts=_counts(*sides) if any(sides) else [],
        lengths=lengths.draw(number(told.get("width")) or 0.0, *(_numbers(side.get("lengths")) for side in sides)),
        notes=[clean(note) for note in notes[:20]] if isinstance(notes, list) else [],
        rows=[row(mapping(one)) for one in shown[:ROWS]] if isinstance(shown, list) else [],
    )


def _counts(train: dict[str, Any], held_out: dict[str, Any]) -> list[tuple[str, str, str]]:
    def both(what: str, value: Any) -> tuple[str, str, str]:
        return what, value(train), value(held_out)

    return [
        both("rows", lambda side: fixed(side.get("rows"))),
        both("tokens", lambda side: fixed(side.get("tokens"))),
        both("tokens a row, mean", lambda side: _mean(side.get("tokens"), side.get("rows"))),
        both("tokens a row, longest", lambda side: fixed(side.get("longest"))),
        both("target tokens", lambda side: fixed(side.get("target_tokens"))),
        both("share of target tokens", lambda side: percent(side.get("target_tokens"), side.get("tokens"))),
        both("rows truncated to data.max_length", lambda side: fixed(side.get("truncated"))),
    ]


def _mean(total: object, rows: object) -> str:
    whole, parts = number(total), number(rows)
    return MISSING if whole is None or not parts else fixed(whole / parts, 1)


def _numbers(values: object) -> list[float]:
    found = [number(value) for value in values[:200]] if isinstance(values, list) else []
    return [value if value is not None and value > 0 else 0.0 for value in found]


def row(told: dict[str, Any]) -> Row:
    runs, left = [], PIECES
    listed = told.get("runs")
    for one in map(mapping, listed[:200] if isinstance(listed, list) else []):
        given = one.get("pieces")
        pieces = [visible(clean(piece)) for piece in given[:left]] if isinstance(given, list) else []
        left -= len(pieces)
        runs.append(Run(one.get("target") is True, pieces, "" if pieces else fixed(one.get("left_out"))))
    cut = number(told.get("cut"))
    heading = [
        f"row {clean(told.get('row', MISSING))}",
        f"{fixed(told.get('tokens'))} tokens",
        f"{fixed(told.get('target_tokens'))} of them learnt",
        *([f"{fixed(cut)} cut off"] if cut else []),
    ]
    return Row(" · ".join(heading), runs)


def visible(piece: str) -> str:
    """Line feeds and tabs have a sign of their own: which of them are tokens is what one looks for."""
    return piece.replace("\n", "↵\n").replace("\t", "→\t")
