"""``lowrank resume``: a run directory's own configuration, changed where that is asked for, taken up in its place."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from lowrank import compose, run
from lowrank.errors import ConfigError
from lowrank.record import source
from lowrank.schema import Config, Data, Model
from lowrank.session import identity

Group = TypeVar("Group", Data, Model)


def resume(folder: Path, overrides: list[str], stopping: Any = None) -> run.Run:
    """Trains on in ``folder`` what its config.yaml describes, as ``train.py`` does with ``checkpoint.resume=true``.

    Raises the errors of ``lowrank.errors``.
    """
    folder = folder.resolve()
    _, told = identity.recorded(folder)
    command = str(told["command"]) if told.get("command") else None
    if command and overrides:
        command = f"{command} {shlex.join(overrides)}"
    return run.train(configuration(folder, told, overrides), folder, command, stopping)


def configuration(folder: Path, told: dict[str, Any], overrides: list[str], command: str = "resume") -> Config:
    """The run's, with its paths as they were where it was started; nothing that differs is allowed but by this call.

    ``told`` is the provenance in the run directory: what it says of modules is a hint, and no reason to import.
    """
    lacking = lacking_modules(told.get("modules"))
    try:
        found = run.open(folder).config
    except ConfigError as error:
        if not lacking or "cannot be imported" not in str(error):
            raise
        again = shlex.join([f"PYTHONPATH={os.pathsep.join(lacking)}", "lowrank", command, str(folder), *overrides])
        raise ConfigError(f"{error}\nThe run found it in {lacking[0]}. If that is yours: {again}") from error
    home = str(told.get("directory") or os.getcwd())
    found = replace(
        found,
        data=with_paths(found.data, home, "path", "eval_path"),
        model=with_paths(found.model, home, "name"),
        checkpoint=replace(found.checkpoint, allow=[]),
    )
    changed = compose.changed(found, overrides)
    return replace(changed, checkpoint=replace(changed.checkpoint, resume=True))


def lacking_modules(told: Any) -> list[str]:
    """The folders of own modules that cannot be found: neither beside train.py, which always is on the import path of
    a run, nor here, nor where this user has trained with them before."""
    script = source.entry()
    known = source.remembered()
    folders = {str(name): str(folder) for name, folder in told.items()} if isinstance(told, dict) else {}
    for folder in [
        *([str(script.parent)] if script else []),
        os.getcwd(),
        *(f for f in folders.values() if f in known),
    ]:
        if folder not in sys.path:
            sys.path.append(folder)
    return list(dict.fromkeys(f for name, f in folders.items() if find_spec(name.partition(".")[0]) is None))


def with_paths(group: Group, home: str, *names: str) -> Group:
    """Relative paths that lead to something from ``home``, the folder in which the run was started, from there."""
    paths = {name: os.path.join(home, value) for name in names if (value := getattr(group, name))}
    there: dict[str, Any] = {name: path for name, path in paths.items() if os.path.exists(path)}
    return replace(group, **there) if home != os.getcwd() else group
