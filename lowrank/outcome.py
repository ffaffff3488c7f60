"""What a finished run leaves of its adapters: themselves, and what they have learnt."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from lowrank import directory
from lowrank.adapters import store
from lowrank.directory import Log
from lowrank.errors import ConfigError
from lowrank.export.peft import export_peft
from lowrank.inspect import spectra

CHEAP = 6e8  # multiplications for a site's singular values: SmolLM2's largest layer, whatever the method


def save_adapter(model: Any, folder: Path, base: dict[str, str], base_name: str | None, log: Log) -> None:
    """``adapter/`` in our own format, and beside it in PEFT's where that has one."""
    store.save_adapter(model, folder, base=base)
    try:
        export_peft(model, folder, base_name=base_name)
    except ConfigError as error:
        log.note(f"adapter/ is in our own format alone: {str(error).removeprefix('export: ')}")


def write_spectra(model: Any, path: Path, log: Log) -> None:
    """``spectra.json``. A run whose adapter cannot be looked into is no failed run: the adapter is saved."""
    try:
        found = spectra([model], most=CHEAP).to_dict()
    except Exception:  # a fault of the adapter's own merge, shown whole
        log.say(f"no {path.name}:\n{traceback.format_exc()}")
        return
    directory.write_json(path, found)
