"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank import directory
from lowrank.config import Checkpoint
from lowrank.directory import Log
from lowrank.errors import RefusedError
from lowrank.train import checkpoint


def saved(settings: Checkpoint, folder: Path, identity: dict[str, Any], log: Log) -> checkpoint.Saved | None:
    """The newest checkpoint that verifies; None where the run starts at step 1.

    Raises RefusedError where none verifies, or what the run's numbers depend on has changed and is not allowed to.
    """
    if not settings.resume:
        return None
    path, wrong = checkpoint.newest(folder / directory.CHECKPOINTS)
    for fault in wrong:
        log.say(f"{fault}; using {path.name if path else 'none'}.")
    if path is None:
        if wrong:
            raise RefusedError(f"{folder}: no checkpoint verifies, so there is nothing to resume from.")
        log.say("nothing to resume from; starting at step 1")
        return None
    found = checkpoint.read(path)
    refuse_drift(checkpoint.differences(found.state["identity"], identity), settings.allow)
    log.say(f"resuming after step {found.state['loop']['step']} from {path}")
    return found


def refuse_drift(changed: dict[str, str], allowed: list[str]) -> None:
    refused = {name: how for name, how in changed.items() if name not in allowed and name.split(".")[0] not in allowed}
    if refused:
        what = "; ".join(f"{name} {how}" for name, how in refused.items())
        raise RefusedError(f"resume refused: {what}. To accept: 'checkpoint.allow=[{','.join(refused)}]'.")
