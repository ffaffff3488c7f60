"""TensorBoard: ``tensorboard --logdir outputs`` shows every run below ``outputs``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lowrank.track import Tracker


class TensorBoard(Tracker):
    """Writes event files to ``tensorboard/`` in the run directory, flushed at each step."""

    def __init__(self, track: Any, folder: Path, config: Any) -> None:
        self.folder, self.config = folder / "tensorboard", json.dumps(config, indent=2, ensure_ascii=False)
        self.writer: Any = None

    def log(self, step: int, values: Any) -> None:
        if self.writer is None:  # a resumed run takes back what an interrupted one wrote from here on
            self.writer = SummaryWriter(str(self.folder), purge_step=step)
            self.writer.add_text("config", f"```\n{self.config}\n```", step)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def samples(self, step: int, rows: Any) -> None:
        for place, row in enumerate(rows if self.writer else ()):
            text = "\n\n".join(f"**{name}**\n```\n{value}\n```" for name, value in row.items())
            self.writer.add_text(f"samples/{place}", text, step)

    def attach(self, step: int, path: Path) -> None:
        if self.writer:  # a page has no place there
            self.writer.add_text(path.name, f"`{path.resolve()}`", step)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
