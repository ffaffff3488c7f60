"""Weights & Biases, online or, with ``WANDB_MODE=offline``, into the run directory for ``wandb sync`` later."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import wandb

from lowrank.track import Tracker


class WeightsAndBiases(Tracker):
    """One wandb run a run directory: its id is kept there, so that a resumed run continues its curves."""

    def __init__(self, track: Any, folder: Path, config: Any) -> None:
        kept = folder / "wandb" / "id"
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.is_file():
            kept.write_text(secrets.token_hex(4))
        name, known = track.name or folder.name, kept.read_text()
        # Off: what it would read of this machine, its command line with secrets in it, and of the terminal.
        settings = wandb.Settings(console="off", x_disable_meta=True)
        where = {"project": track.project, "name": name, "dir": str(folder), "id": known, "resume": "allow"}
        self.run = wandb.init(**where, config=config, settings=settings)

    def log(self, step: int, values: Any) -> None:
        self.run.log(values, step=step)

    def samples(self, step: int, rows: Any) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])
        self.run.log({"samples": table}, step=step)

    def attach(self, step: int, path: Path) -> None:
        self.run.log({path.stem: wandb.Html(path.read_text(encoding="utf-8"), inject=False)}, step=step)

    def close(self) -> None:
        self.run.finish()
