"""The run directories below some folders, each as its own files tell of it; one that is broken says why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lowrank.compare.keys import flat, looked_up, measured, natural
from lowrank.errors import ConfigError, RefusedError
from lowrank.record import directory as names
from lowrank.record.directory import read_json
from lowrank.record.lock import LOCK, OWNER, living
from lowrank.report.figures import clean, mapping

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C's is fifteen times as fast
MARKS = {names.SUMMARY, names.METRICS, names.EVENTS, names.IDENTITY}  # one of these is in every run directory
PARTS = {names.CHECKPOINTS, names.ADAPTER, names.PROFILE, "tensorboard", "wandb"}  # hold no runs
SWEEP = "multirun.yaml"  # in a sweep's folder, which is no run
TAIL = 1 << 16  # bytes of metrics.jsonl that are sure to hold its last line
# What a figure depends on beside the configuration, from identity.json: two runs that differ in it are no repeats.
CONDITIONS = {"code": "code", "data": "data.sha256", "base": "base", "machine": "machine", "versions.torch": "torch"}
RESOLVED = ("loop.precision", "loop.device", "model.dtype")  # there as what `auto` came to


@dataclass(frozen=True)
class Found:
    """One run directory."""

    folder: Path
    name: str  # told apart by it from all others
    status: str  # done, failed, interrupted, running, cut off, unreadable
    cause: str  # why it is not done; empty where it is
    keys: Mapping[str, Any]  # the configuration, and what else its figures depend on, under dotted names
    summary: Mapping[str, Any]

    def metric(self, name: str) -> float | None:
        return measured(self.summary, name)

    @property
    def done(self) -> bool:
        return self.status == "done"


def found(folders: Sequence[str | Path]) -> list[Found]:
    """Every run in or below ``folders``, in the order of their names. Raises ConfigError where there is none."""
    places: dict[str, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ConfigError(f"{clean(folder)}: no such folder. Name run directories, or folders that hold some.")
        below = list(runs_below(folder))
        if not below:
            raise ConfigError(f"{clean(folder)}: no run directory in it or below it.")
        places |= {os.path.realpath(path): path for path in below}
    common = os.path.commonpath([os.path.dirname(path) for path in places])
    read = [one(folder, clean(os.path.relpath(real, common))) for real, folder in places.items()]
    return sorted(read, key=lambda run: natural(run.name))


def runs_below(folder: Path) -> Iterator[Path]:
    """Every run directory in it, itself included; links are not followed, hidden folders not looked into."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        yield folder  # which then says that it cannot be read
        return
    files = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
    folders = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    begun = {LOCK, OWNER} & files and not folders  # ended before it wrote anything
    if SWEEP not in files and (MARKS & files or begun):
        yield folder
    for name in sorted(folders - PARTS):
        if not name.startswith("."):
            yield from runs_below(folder / name)


def one(folder: Path, name: str) -> Found:
    """What a run directory says of itself; never an error about its content."""
    faults: list[str] = []
    summary = json_of(folder, names.SUMMARY, faults)
    identity = mapping(json_of(folder, names.IDENTITY, faults).get("identity"))
    keys = flat(config_of(folder, faults))
    keys |= {key: identity[key] for key in RESOLVED if key in identity and key in keys}
    keys |= {shown: identity[key] for key, shown in CONDITIONS.items() if key in identity}
    if "data.sha256" not in keys and (content := looked_up(summary, "data.sha256")) is not None:
        keys["data.sha256"] = content
    status, cause = state(folder, summary, faults, keys.get("loop.steps"))
    return Found(folder, name, status, clean(cause), keys, summary)


def json_of(folder: Path, name: str, faults: list[str]) -> dict[str, Any]:
    try:
        return read_json(folder / name)
    except (RefusedError, OSError) as error:
        faults.append(f"{name}: {str(error).removeprefix(f'{folder / name}: ')}")
        return {}


def config_of(folder: Path, faults: list[str]) -> dict[str, Any]:
    """``config.yaml``; a launcher's failed job may have none, and then it has no keys."""
    try:
        told = yaml.load((folder / names.CONFIG).read_bytes(), Loader=LOADER)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        faults.append(f"{names.CONFIG}: not readable ({reason}).")
        return {}
    if not isinstance(told, dict):
        faults.append(f"{names.CONFIG}: holds no keys.")
    return mapping(told)


def state(folder: Path, summary: Mapping[str, Any], faults: Sequence[str], steps: Any) -> tuple[str, str]:
    """Status and cause. A lock of a process that lives makes a run that is not done a running one."""
    status = summary.get("status")
    if faults or not os.access(folder, os.R_OK | os.X_OK):
        return "unreadable", " ".join(faults) or "the folder cannot be read."
    if status == "done":
        return "done", ""
    at = reached(folder, steps)
    if owner := living(folder):
        return "running", f"in use by {owner}, {at}"
    if status == "failed":
        lines = str(summary.get("error") or "").strip().splitlines()
        return "failed", lines[0] if lines else f"no error is told, {at}"
    if status == "interrupted":
        return "interrupted", f"stopped {at}; go on with: lowrank resume {folder}"
    if status is None:
        return "cut off", f"ended without a summary, {at}"
    return "unreadable", f"{names.SUMMARY}: its status is {status!r}."


def reached(folder: Path, steps: Any) -> str:
    """``at step 12 of 40``, from the last whole line of its metrics."""
    try:
        with (folder / names.METRICS).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().splitlines()
    except OSError:
        lines = []
    for line in reversed(lines):
        try:
            step = mapping(json.loads(line)).get("step")
        except (ValueError, RecursionError):
            continue
        if isinstance(step, int):
            return f"at step {step}" + (f" of {steps}" if isinstance(steps, int) else "")
    return "before the first step"
