"""Weights & Biases, online or, with ``WANDB_MODE=offline``, into the run directory for ``wandb sync`` later."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import wandb

from lowrank.schema import Track


class WeightsAndBiases:
    """One wandb run a run directory: its id is kept there, so that a resumed run continues its curves."""

    def __init__(self, track: Track, folder: Path, config: dict[str, Any]) -> None:
        kept = folder / "wandb" / "id"
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.is_file():
            kept.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=track.project,
            name=track.name or folder.name,
            config=config,
            dir=str(folder),
            id=kept.read_text(),
            resume="allow",
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()
