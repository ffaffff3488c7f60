"""A plan as a value: its rows, how they print, their JSON form, and what differs between two of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lowrank.adapters.sites import place, short_names

LARGEST = 2**50  # of any size or count: the values of a weight beyond that would be petabytes
Named = tuple[str, str]  # a path, and what is said of it


@dataclass(frozen=True)
class Row:
    """One site of a plan (or, for ``Full``, one parameter of the base)."""

    path: str
    kind: str  # the module's class
    shape: tuple[int, ...]  # (out, in)
    adapter: str  # dotted path of the class
    options: dict[str, Any]
    parameters: int
    group: str  # sites of a group share their dropout mask

    @property
    def method(self) -> str:
        return self.adapter.rsplit(".", 1)[-1]

    @property
    def call(self) -> str:
        """``LoRA(r=8, alpha=16)``."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method}({options})" if options else self.method


@dataclass(frozen=True)
class InjectionPlan:
    """An ordered table of sites. ``print(plan)`` shows it; ``to_dict`` and ``from_dict`` are its JSON form."""

    rows: tuple[Row, ...]
    total_parameters: int  # of the base
    notes: tuple[str, ...] = ()  # what it does not cover

    @property
    def trainable_parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        cells = [("path", "kind", "shape", "adapter", "parameters")]
        cells += [(row.path, row.kind, dimensions(row.shape), row.call, f"{row.parameters:,}") for row in self.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(5)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(line[:4], widths, strict=False)), line[4].rjust(widths[4])])
            for line in cells
        ]
        total, base = self.trainable_parameters, self.total_parameters
        lines.append(
            f"{len(self.rows)} rows, {total:,} trainable parameters ({4 * total / 2**20:.1f} MiB in fp32), "
            f"{100 * total / max(base, 1):.2f} % of the base's {base:,}"
        )
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [vars(row) | {"shape": list(row.shape)} for row in self.rows],
            "total_parameters": self.total_parameters,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> InjectionPlan:
        """Raises TypeError or KeyError where ``data`` is not the JSON form of a plan."""
        rows = tuple(Row(**(row | {"shape": tuple(row["shape"])})) for row in data["rows"])
        for row in rows:
            if not plausible(row):
                raise TypeError(f"a row is {str(row)[:200]}")
        if len({row.path for row in rows}) < len(rows):
            raise TypeError("two rows are for one site")
        total, notes = data["total_parameters"], data["notes"]
        if not (is_count(total) and isinstance(notes, list) and all(isinstance(note, str) for note in notes)):
            raise TypeError("its total is no number, or its notes are no texts")
        return cls(rows, total, tuple(notes))

    def diff(self, other: InjectionPlan) -> PlanDiff:
        """What ``other`` has instead: a value that prints."""
        return PlanDiff(self, other)


@dataclass(frozen=True)
class PlanDiff:
    """What differs between two plans. It prints in full where sites differ each in its own way, and in a line for
    all the sites of one name that differ alike: ``*.q_proj@0-7 (8 sites): r 8 → 16``."""

    first: InjectionPlan
    second: InjectionPlan

    @property
    def same(self) -> bool:
        return self.first == self.second

    @property
    def only_first(self) -> tuple[Row, ...]:
        there = {row.path for row in self.second.rows}
        return tuple(row for row in self.first.rows if row.path not in there)

    @property
    def only_second(self) -> tuple[Row, ...]:
        return PlanDiff(self.second, self.first).only_first

    @property
    def changed(self) -> tuple[tuple[Row, Row], ...]:
        """Both rows of every site on which the plans differ."""
        there = {row.path: row for row in self.second.rows}
        pairs = ((row, there[row.path]) for row in self.first.rows if row.path in there)
        return tuple((row, other) for row, other in pairs if row != other)

    def __str__(self) -> str:
        if self.same:
            return "the plans are the same"
        known = [*dict.fromkeys(row.path for plan in (self.first, self.second) for row in plan.rows)]
        parts = (
            ("only in the first", [(row.path, alone(row)) for row in self.only_first]),
            ("only in the second", [(row.path, alone(row)) for row in self.only_second]),
            ("changed", [(row.path, "; ".join(changes(row, other))) for row, other in self.changed]),
        )
        lines = [line for title, found in parts if found for line in (f"{title}:", *alike(found, known))]
        return "\n".join([*lines, *self.totals()])

    def totals(self) -> Iterator[str]:
        """The plans' totals, and what differs beside their rows."""
        first, second = self.first, self.second
        trained = arrow("trainable parameters", first.trainable_parameters, second.trainable_parameters)
        yield f"{arrow('rows', len(first.rows), len(second.rows))}, {trained}"
        if first.total_parameters != second.total_parameters:
            yield arrow("the base's parameters", first.total_parameters, second.total_parameters)
        yield from (f"only in the first: {note}" for note in first.notes if note not in second.notes)
        yield from (f"only in the second: {note}" for note in second.notes if note not in first.notes)
        if not (self.only_first or self.only_second or self.changed) and first.rows != second.rows:
            yield "their rows stand in another order"


def plausible(row: Row) -> bool:
    """Whether every field is of the kind that it should be, and its sizes are those that memory could have."""
    texts = (row.path, row.kind, row.adapter, row.group)
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(row.options, dict)
        and all(is_count(n) for n in (*row.shape, row.parameters))
        and math.prod(row.shape) <= LARGEST
    )


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def dimensions(shape: Iterable[int]) -> str:
    return "×".join(str(n) for n in shape)


def alone(row: Row) -> str:
    return f"{row.call} on {dimensions(row.shape)}, {row.parameters:,} parameters"


def arrow(what: str, old: object, new: object) -> str:
    """``r 8 → 16``, or ``rows 30`` where nothing changed."""
    texts = [f"{value:,}" if type(value) is int else str(value) for value in (old, new)]
    return f"{what} {texts[0]}" + (f" → {texts[1]}" if texts[0] != texts[1] else "")


def changes(row: Row, other: Row) -> Iterator[str]:
    """What differs between two rows of one path."""
    if row.adapter != other.adapter:
        names = (row.call, other.call) if row.method != other.method else (row.adapter, other.adapter)
        yield f"{names[0]} → {names[1]}"
    else:
        for name in dict.fromkeys([*row.options, *other.options]):
            old, new = (one.options.get(name, "by default") for one in (row, other))
            if old != new:
                yield arrow(name, old, new)
    for what, old, new in (
        ("site", row.kind, other.kind),
        ("shape", dimensions(row.shape), dimensions(other.shape)),
        ("parameters", row.parameters, other.parameters),
        ("mask group", row.group, other.group),
    ):
        if old != new:
            yield arrow(what, old, new)


def alike(found: Iterable[Named], known: Iterable[str]) -> Iterator[str]:
    """A line for all paths of one name that the same is said of. ``known``: every path that the plans have."""
    names = short_names(known)
    everywhere: dict[str, list[str]] = {}
    for path, name in names.items():
        everywhere.setdefault(name, []).append(path)
    groups: dict[tuple[str, str], list[str]] = {}
    for path, said in found:
        groups.setdefault((names[path], said), []).append(path)
    for (name, said), paths in groups.items():
        if len(paths) == 1:
            yield f"  {paths[0]}: {said}"
            continue
        limit = "" if len(paths) == len(everywhere[name]) else f"@{ranges(place(path)[1] or 0 for path in paths)}"
        pattern = name if name == "blocks" or "*" in name else f"*.{name}"
        yield f"  {pattern}{limit} ({len(paths)} sites): {said}"


def ranges(numbers: Iterable[int]) -> str:
    """``0-7,12``: what stands behind the ``@`` of a pattern."""
    parts: list[tuple[int, int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], n)
        else:
            parts.append((n, n))
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
