"""Where records come from, and which of them are for training and which for evaluation.

The split and the limit depend on the data's seed alone. Records keep the order of their file: in which
order they are trained on is not decided here.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from lowrank.data import files, stdlib
from lowrank.data.table import Table
from lowrank.errors import ConfigError, DataError, did_you_mean
from lowrank.keys import key


class Fields(Protocol):
    """Which column of a file holds what; None: there is no such column."""

    @property
    def instruction(self) -> str | None: ...
    @property
    def input(self) -> str | None: ...
    @property
    def response(self) -> str | None: ...
    @property
    def text(self) -> str | None: ...


class Settings(Protocol):
    """What ``load`` reads of the configuration's ``data`` group."""

    @property
    def kind(self) -> str: ...
    @property
    def path(self) -> str | None: ...
    @property
    def eval_path(self) -> str | None: ...
    @property
    def eval_fraction(self) -> float: ...
    @property
    def fields(self) -> Fields: ...
    @property
    def template(self) -> str: ...
    @property
    def on_malformed(self) -> str: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Record:
    """One row: ``fields`` holds instruction, input and response, or text alone.

    ``row`` is 1-based: the line it starts on in its file, or its place among the library's functions.
    """

    row: int
    fields: dict[str, str]


@dataclass(frozen=True)
class Split:
    """Records to train on and to evaluate on, each in file order; ``sha256`` is that of what was read for them."""

    train: list[Record]
    eval: list[Record]
    sha256: str
    name: str
    notes: tuple[str, ...] = ()  # rows that were dropped


def load(data: Settings, cache: Path | None = None) -> Split:
    """The records that ``data`` describes; at least one to train on and one to evaluate on. ``cache`` is a folder for
    what takes long to find.

    Raises DataError for what is wrong with a file, ConfigError for settings that do not go together.
    """
    split = from_stdlib(data, cache) if data.kind == "stdlib" else from_files(data)
    if data.limit is not None:
        order = torch.randperm(len(split.train), generator=key(data.seed, "limit"))[: max(data.limit, 0)]
        split = replace(split, train=[split.train[i] for i in sorted(order.tolist())])
    if not split.train or not split.eval:
        have = f"{files.counted(len(split.train), 'record')} to train on, {len(split.eval):,} to evaluate on"
        raise DataError(f"data: {split.name} gives {have}; at least one of each is needed.")
    return split


def from_stdlib(data: Settings, cache: Path | None) -> Split:
    """Functions of the standard library; the split is by module, so no file is on both sides."""
    for name in ("path", "eval_path"):
        if getattr(data, name):
            raise ConfigError(f"data.{name}: data=stdlib reads no file. Use data=jsonl or data=csv.")
    if data.template == "plain":
        raise ConfigError("data.template: 'plain' needs a text; data=stdlib has instruction, input, response.")
    found = stdlib.functions(cache=cache)
    content = json.dumps([(function.module, function.source, function.summary) for function in found])
    records = [
        Record(row, {"instruction": stdlib.INSTRUCTION, "input": function.source, "response": function.summary})
        for row, function in enumerate(found, 1)
    ]
    chosen = held_out([function.module for function in found], data.eval_fraction, data.seed)
    name = f"Python {platform.python_version()} standard library"
    return divided(records, chosen, hashlib.sha256(content.encode()).hexdigest(), name)


def from_files(data: Settings) -> Split:
    """Records of one file, split by row, or of two files."""
    path = files.locate(data.path, "data.path")
    eval_path = files.locate(data.eval_path, "data.eval_path") if data.eval_path else None
    columns = wanted(data.fields, data.template)
    table = Table(data.kind, path, data.on_malformed)
    records = read(table, columns)
    if eval_path:
        other = Table(data.kind, eval_path, data.on_malformed)
        held = read(other, columns)
        sha256 = hashlib.sha256((table.sha256 + other.sha256).encode()).hexdigest()
        return Split(records, held, sha256, f"{path.name}, {eval_path.name}", (*table.notes(), *other.notes()))
    chosen = held_out(range(len(records)), data.eval_fraction, data.seed)
    return replace(divided(records, chosen, table.sha256, path.name), notes=table.notes())


def wanted(fields: Fields, template: str) -> dict[str, str]:
    """{what: its column} for a template; ConfigError where the template needs a column that is not named."""
    columns = {}
    for what in ("text",) if template == "plain" else ("instruction", "input", "response"):
        column = getattr(fields, what)
        if column is not None:
            columns[what] = column
        elif what != "input":
            raise ConfigError(f"data.fields.{what}: not set; data.template={template} needs a column's name.")
    return columns


def read(table: Table, columns: dict[str, str]) -> list[Record]:
    """The records of one file; DataError if it is empty or lacks a column, or by the table's policy for a value that
    is not text."""
    records: list[Record] = []
    seen: dict[str, None] = {}  # every column of the file, in the order met
    lacking: dict[str, int] = {}  # what → the first row without its column
    name = table.path.name
    for number, cells in table.rows():
        seen.update(dict.fromkeys(cells))
        lacks = [what for what, column in columns.items() if column not in cells]
        for what in lacks:
            lacking.setdefault(what, number)
        if table.on_malformed == "drop" and any(what != "input" for what in lacks):
            what = next(what for what in lacks if what != "input")
            table.refuse(number, f"no '{columns[what]}' in this row, which data.fields.{what} names.")
            continue
        try:
            fields = {what: text_of(what, column, cells) for what, column in columns.items()}
        except ValueError as error:
            table.refuse(number, str(error))
            continue
        records.append(Record(number, {"input": "", **fields} if "response" in columns else fields))
    if not table.seen:
        raise DataError(f"{name}: no rows.")
    for what, number in lacking.items():
        if table.on_malformed == "error" or columns[what] not in seen:
            require(what, columns[what], list(seen), name, number)
    table.notes()  # raises where nothing is left
    return records


def require(what: str, column: str, seen: list[str], name: str, number: int) -> None:
    """Raise DataError for a column that row ``number`` lacks, unless it is an input that may be left out.

    A file need not have the default input column at all, but a column named by the user must exist.
    """
    if what == "input" and (column in seen or column == "input"):
        return
    has = f"(has: {files.listed(seen)}).{did_you_mean(column, seen)}"
    if column in seen:
        raise DataError(f"{name}:{number}: no '{column}' in this row, which data.fields.{what} names.")
    raise DataError(f"data.fields.{what}: no column '{column}' in {name} {has}")


def text_of(what: str, column: str, cells: Mapping[str, object]) -> str:
    """A row's value of a column if it is text (numbers are not guessed to be), or nothing. ValueError says why not."""
    value = cells.get(column, "")
    if value is None and what == "input":
        return ""
    if not isinstance(value, str):
        raise ValueError(f"'{column}' is {files.kind_of(value)}; a string is needed.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell one half of a surrogate pair, "\ud83d"
        half = ord(value[error.start])
        raise ValueError(f"'{column}' holds half a surrogate pair (\\u{half:04x}), which is not text.") from None
    return value


def held_out(groups: Sequence[Hashable], fraction: float, seed: int) -> list[bool]:
    """For each record, by its group, whether it is for evaluation.

    Whole groups are taken in an order keyed by the seed as long as they fit into ``fraction`` of the records
    (at least one record, unless the fraction is 0), so no group is on both sides.
    """
    sizes = Counter(groups)
    room = max(1, int(fraction * len(groups) + 0.5)) if fraction > 0 else 0
    names, chosen = list(sizes), set()
    for index in torch.randperm(len(names), generator=key(seed, "split")).tolist():
        if sizes[names[index]] <= room:
            chosen.add(names[index])
            room -= sizes[names[index]]
    return [group in chosen for group in groups]


def divided(records: list[Record], chosen: list[bool], sha256: str, name: str) -> Split:
    """The records that were not, and those that were, chosen for evaluation."""
    train = [record for record, is_eval in zip(records, chosen, strict=True) if not is_eval]
    held = [record for record, is_eval in zip(records, chosen, strict=True) if is_eval]
    return Split(train, held, sha256, name)
