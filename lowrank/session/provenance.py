"""Where a run's numbers come from, told in its directory: nothing of it is compared."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank.assemble import Parts
from lowrank.disk import write_text
from lowrank.record import directory, source
from lowrank.schema import Config
from lowrank.session.identity import differences, named_classes
from lowrank.train.checkpoint import Saved


def of_run(config: Config) -> Config:
    """What config.yaml holds: the run, whose end is the same however often it was gone on with."""
    return replace(config, checkpoint=replace(config.checkpoint, resume=False, allow=[]))


def write(folder: Path, identity: Mapping[str, Any], parts: Parts, command: str | None, saved: Saved | None) -> None:
    """``identity.json``, and ``code.patch`` where the code is not all committed.

    Where a run goes on, what an earlier process told of itself stays under ``earlier``.
    """
    code, before = source.checkout(), directory.read_json(folder / directory.IDENTITY) if saved is not None else {}
    modules = source.own_modules(named_classes(parts.config, parts.plan))
    told: dict[str, Any] = {
        "command": command,
        "directory": os.getcwd(),
        "host": socket.gethostname(),
        "python": sys.executable,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": code.to_dict(),
        "modules": modules,
    }
    if saved is not None:
        told |= {
            "after_step": saved.state["loop"]["step"],
            "changed": differences(saved.state["identity"], identity),
        }
    earlier = [*before.get("earlier", []), *([before["provenance"]] if "provenance" in before else [])]
    directory.write_json(
        folder / directory.IDENTITY,
        {"identity": identity, "provenance": told, **({"earlier": earlier} if earlier else {})},
    )
    if code.patch:
        write_text(folder / directory.PATCH, code.patch)
    else:
        (folder / directory.PATCH).unlink(missing_ok=True)
    source.remember(modules.values())
