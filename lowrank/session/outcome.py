"""What a run leaves: its adapters, what they have learnt, and the figures of its summary."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch

from lowrank.adapters import store
from lowrank.adapters.inject import named_trainable
from lowrank.assemble import Data, Loaded, Parts
from lowrank.errors import ConfigError
from lowrank.export.peft import export_peft
from lowrank.inspect import spectra
from lowrank.manifest import committing
from lowrank.models.fingerprint import base_id
from lowrank.record import directory
from lowrank.record.directory import Log
from lowrank.report import lr_range as range_test
from lowrank.schema import Config
from lowrank.session.identity import versions
from lowrank.train.checkpoint import refuse_not_finite
from lowrank.train.digests import digest_of_all
from lowrank.train.loop import Loop, State, peak_memory_mb
from lowrank.train.metrics import read as read_metrics

CHEAP = 6e8  # multiplications for a site's singular values: SmolLM2's largest layer, whatever the method


def save_adapter(model: Any, folder: Path, base: dict[str, str], base_name: str | None, log: Log, *, step: int) -> None:
    """``adapter/`` in our own format, and beside it in PEFT's where that has one: whole, or as it was before.

    Raises NumericsError, with nothing written, where a value is not finite.
    """
    refuse_not_finite(named_trainable(model), step)
    with committing(folder, step=step) as staging:
        store.save_adapter(model, staging.folder, base=base)
        try:
            export_peft(model, staging.folder, base_name=base_name)
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
        "skipped_steps": state.skipped,
        "seconds": state.seconds,
        "real_tokens": state.real_tokens,
        "target_tokens": state.target_tokens,
        "tokens_per_s": state.real_tokens / state.seconds if state.seconds else None,
        "peak_memory_mb": peak_memory_mb(parts.device),
        "trainable_parameters": parts.plan.trainable_parameters,
        "total_parameters": parts.plan.total_parameters,
    }


def lr_range(config: Config, folder: Path) -> dict[str, float] | None:
    """What a learning-rate range test has found; nothing of any other run."""
    if config.schedule.kind != range_test.KIND:
        return None
    found = range_test.range_of(read_metrics(folder / directory.METRICS))
    return found.to_dict() if found else None


def hashes(loop: Loop) -> dict[str, str]:
    """Of the weights that train, as they are now, and of the rows in the order in which they were trained on."""
    return {"weights": digest_of_all(loop.parameters), "data_order": loop.state.data_order}


def conditions(parts: Parts, loaded: Loaded, data: Data, base: dict[str, str], fast: str) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "seed": parts.config.loop.seed,
        "precision": parts.precision,
        "device": str(parts.device),
        "threads": torch.get_num_threads(),
        "fast": fast,
        "packed": loaded.packed,
        "base": base_id(base),
        "data": {"name": data.split.name, "sha256": data.split.sha256},
        "versions": versions(),
    }
