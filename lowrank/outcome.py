"""What a run leaves: its adapters, what they have learnt, and the figures of its summary."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch

from lowrank import directory
from lowrank.adapters import store
from lowrank.assemble import Data, Loaded, Parts
from lowrank.directory import Log
from lowrank.errors import ConfigError
from lowrank.export.peft import export_peft
from lowrank.identity import versions
from lowrank.inspect import spectra
from lowrank.models.fingerprint import base_id
from lowrank.train.loop import State, peak_memory_mb

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


def course(state: State, parts: Parts) -> dict[str, Any]:
    """The training steps in figures."""
    return {
        "steps": state.step,
        "seconds": state.seconds,
        "real_tokens": state.real_tokens,
        "target_tokens": state.target_tokens,
        "tokens_per_s": state.real_tokens / state.seconds if state.seconds else None,
        "peak_memory_mb": peak_memory_mb(parts.device),
        "trainable_parameters": parts.plan.trainable_parameters,
        "total_parameters": parts.plan.total_parameters,
    }


def conditions(parts: Parts, loaded: Loaded, data: Data, base: dict[str, str]) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "seed": parts.config.loop.seed,
        "precision": parts.precision,
        "device": str(parts.device),
        "threads": torch.get_num_threads(),
        "fast": loaded.fast,
        "packed": loaded.collate.__name__ == "pack",
        "base": base_id(base),
        "data": {"name": data.split.name, "sha256": data.split.sha256},
        "versions": versions(),
    }
