"""Where a run's numbers come from: the command, the processes that made it, the code, the machine and its packages."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

from lowrank.report.figures import clean, fixed, mapping
from lowrank.report.recorded import Recorded

MOST = 50  # processes on a page, the last ones
CONDITIONS = ("device", "machine", "threads", "precision", "fast", "packed", "seed")


@dataclass(frozen=True)
class Process:
    """One that worked on the run, from its first step or on from a checkpoint."""

    time: str
    steps: str
    changed: list[str]
    command: str  # empty where it is the run's


@dataclass(frozen=True)
class Origin:
    command: str
    where: list[tuple[str, str]]  # what the command was run with: folder, commit, patch
    processes: list[Process]  # none where there was but one
    conditions: list[tuple[str, str]]
    versions: list[tuple[str, str]]


def origin(run: Recorded) -> Origin:
    told = run.processes
    last = told[-1] if told else {}
    summary, known = run.summary, mapping(run.identity.get("identity"))
    command = _from_nothing([*(one.get("command") for one in told), summary.get("command")])
    found = {**known, **{name: summary[name] for name in CONDITIONS if summary.get(name) is not None}}
    host = [("host", last["host"]), ("executable", last.get("python"))] if last.get("host") else []
    return Origin(
        command=command,
        where=_where(run, last),
        processes=[_process(one, command) for one in told[-MOST:]] if len(told) > 1 else [],
        conditions=_said([*((name, found.get(name)) for name in CONDITIONS), *host]),
        versions=_said(_versions(summary, known)),
    )


def _from_nothing(commands: list[Any]) -> str:
    """The last command that trains, as it is without a checkpoint to go on from: that of a run from the start."""
    given = [found for command in commands if (found := _command(command))]
    training = [command for command in given if "train.py" in command] or given
    return re.sub(r" '?checkpoint\.(resume|allow)=('[^']*'|\S+)", "", training[-1]) if training else ""


def _where(run: Recorded, last: dict[str, Any]) -> list[tuple[str, str]]:
    git = mapping(run.summary.get("git")) or mapping(last.get("git"))
    commit = clean(git.get("commit") or "")
    if git.get("dirty") is True or run.patched:
        kept = "code.patch in the run directory" if run.patched else "changes that were not kept"
        commit = f"{commit} and {kept}" if commit else kept
    return _said([("in", last.get("directory")), ("code", commit)])


def _process(told: dict[str, Any], known: str) -> Process:
    after, command = told.get("after_step"), _command(told.get("command"))
    return Process(
        time=clean(told.get("time") or ""),
        steps="from the start" if after is None else f"after step {fixed(after)}",
        changed=[f"{clean(name)}: {clean(how)}" for name, how in list(mapping(told.get("changed")).items())[:40]],
        command="" if command == known else command,
    )


def _versions(summary: dict[str, Any], known: dict[str, Any]) -> list[tuple[str, Any]]:
    """Of the summary; of a run that has none yet, of its identity."""
    found = mapping(summary.get("versions"))
    prefix = "versions."
    return list((found or {n.removeprefix(prefix): v for n, v in known.items() if n.startswith(prefix)}).items())


def _said(pairs: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    shown = {True: "yes", False: "no"}
    return [
        (clean(name), shown[value] if isinstance(value, bool) else clean(value))
        for name, value in pairs
        if value not in (None, "")
    ]


def _command(command: object) -> str:
    """A shell line, whether the run kept a string or an argument list."""
    if isinstance(command, list):
        return clean(shlex.join(str(part) for part in command))
    return clean(command or "")
