"""TensorBoard: ``tensorboard --logdir outputs`` shows every run below ``outputs``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lowrank.schema import Track


class TensorBoard:
    """Writes event files to ``tensorboard/`` in the run directory, flushed at each step."""

    def __init__(self, track: Track, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.config = folder / "tensorboard", config
        self.writer: SummaryWriter | None = None

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.writer is None:  # a resumed run takes back what an interrupted one wrote from here on
            self.writer = SummaryWriter(str(self.folder), purge_step=step)
            self.writer.add_text("config", f"```\n{json.dumps(self.config, indent=2, ensure_ascii=False)}\n```", step)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
