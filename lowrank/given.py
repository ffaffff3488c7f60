"""What is wrong with overrides that can be seen before anything is composed, and that Hydra would let pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.errors import ConfigError, did_you_mean
from lowrank.places import check_numbers
from lowrank.rules import refuse, show
from lowrank.schema import GROUPS

FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")  # empty, they would be the current folder
NO_TARGETS = "++adapter.targets=null"  # "++", because of two overrides of one key a sweep keeps the second alone
MOST = 10_000  # jobs of one key
CHOSEN = (*GROUPS, "experiment")
# Flags of train.py that take the word behind them.
WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c")


@dataclass(frozen=True)
class Given:
    """One override as Hydra's grammar reads it."""

    text: str
    key: str
    values: tuple[Any, ...]  # several of a sweep that names them; else its range or its glob
    sweep: bool
    deleted: bool


def words_of(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """A command line's overrides, and the folders of configuration that it names."""
    overrides, folders, before = [], [], ""
    for word in arguments:
        flag, _, value = word.partition("=")
        if before in ("--config-dir", "-cd") or (flag in ("--config-dir", "-cd") and value):
            folders.append(Path(value if word.startswith("-") else word))
        elif before not in WITH_VALUE and not word.startswith("-"):
            overrides.append(word)
        before = word
    return overrides, folders


def check_folders(folders: Sequence[Path]) -> None:
    """Raises ConfigError for what is wrong in a user's files of configuration and could not be seen once composed."""
    for folder in folders:
        if folder.is_dir():
            check_numbers(folder, CHOSEN)


def check_given(given: Sequence[Given], conf: Path) -> None:
    """Raises ConfigError for the first override that Hydra would take for something else than was meant."""
    for one in given:
        if "\0" in one.text:
            raise ConfigError(f"{one.key}: a NUL character is not allowed; no file and no name has one.")
        if not one.key:
            raise ConfigError(f"{one.text}: not a valid override (nothing in front of '='). Write key=value.")
        if one.key in GROUPS and not one.deleted:
            check_choice(one, conf)
        if one.key == "experiment" and None in one.values and not one.deleted:
            raise ConfigError("experiment: null is not a choice; leave it out, or write ~experiment.")
        if one.key in FOLDERS and "" in one.values:
            raise refuse(one.key, "", "a folder")
        if one.key == "hydra.searchpath":
            check_searchpath(one)
        for value in one.values:
            check_range(one, value)
    check_once(given)


def check_choice(one: Given, conf: Path) -> None:
    """One choice of a group, by its name: of a list Hydra would merge the files, of a path take another's."""
    names = sorted(path.stem for path in (conf / one.key).glob("*.yaml"))
    for value in one.values:
        if isinstance(value, list):
            raise refuse(one.key, value, f"one choice, such as {one.key}={next(map(str, value), names[0])}")
        if isinstance(value, (bool, int, float)) or value is None:
            raise ConfigError(f"{one.key}: {show(value)} is not a choice. Allowed: {', '.join(names)}.")
        if isinstance(value, str) and (value.startswith((".", "/")) or value.endswith((".yaml", ".yml"))):
            hint = did_you_mean(Path(value).stem, names)
            raise ConfigError(f"{one.key}: '{value}' is not a choice.{hint} Allowed: {', '.join(names)}.")


def check_once(given: Sequence[Given]) -> None:
    """Of two overrides of one key the last holds; where one of them is a sweep, the jobs of it would be lost."""
    first: dict[str, Given] = {}
    for one in given:
        before = first.setdefault(one.key, one)
        if before is not one and (before.sweep or one.sweep):
            raise ConfigError(f"{one.key}: given twice, as '{before.text}' and as '{one.text}'. Leave one of them out.")


def check_range(one: Given, value: Any) -> None:
    """A range is written out before the first of its jobs is looked at."""
    start, stop, step = (getattr(value, name, None) for name in ("start", "stop", "step"))
    if start is not None and stop is not None and step and abs(stop - start) > MOST * abs(step):
        raise ConfigError(f"{one.key}: '{one.text}' is more than {MOST:,} values, the most that one sweep may have.")


def check_searchpath(one: Given) -> None:
    for place in [place for value in one.values if isinstance(value, list) for place in value]:
        scheme, _, rest = str(place).rpartition("://")
        there = found(rest) if scheme == "pkg" else Path(rest).is_dir()
        if not there:
            raise ConfigError(f"hydra.searchpath: '{place}' is not there; a folder, or pkg://PACKAGE.")


def found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package.replace("/", ".")) is not None
    except (ImportError, ValueError):
        return False


def whole_targets(overrides: Sequence[str]) -> list[str]:
    """``overrides``, so that a mapping of targets takes the place of the YAML's: Hydra would merge the two, and the
    user get the method's own targets beside those that were asked for. A list it would not put for a mapping at all."""
    found: list[str] = []
    for override in overrides:
        several = override.startswith("adapter.targets=") and ("{" in override or "[" in override)
        if several and found[-1:] != [NO_TARGETS]:
            found.append(NO_TARGETS)
        found.append(override)
    return found
