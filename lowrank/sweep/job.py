"""One job of a sweep: a run, its folder, and the command by which anybody can run it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.sweep.origin import Origin

RESUME = "++checkpoint.resume=true"


@dataclass(frozen=True)
class Job:
    number: int  # Hydra's, from 0
    overrides: tuple[str, ...]
    shown: str  # those of them that tell it from the others, without secrets
    folder: Path
    config: dict[str, Any]  # as ``Config.to_dict`` gives it
    origin: Origin
    start: tuple[str, ...]  # what runs it as a process of its own
    own: tuple[str, ...]  # of that process alone: its folder, and what Hydra calls it

    @property
    def command(self) -> str:
        """As its summary tells it."""
        return shlex.join(["python", "train.py", *self.overrides])

    def process(self, *, resume: bool) -> list[str]:
        return [*self.start, *self.overrides, *([RESUME] if resume else []), *self.own]

    def tree(self, *, resume: bool) -> dict[str, Any]:
        """The configuration, to be gone on with or begun."""
        checkpoint = {**self.config["checkpoint"], **({"resume": True} if resume else {})}
        return {**self.config, "checkpoint": checkpoint}
