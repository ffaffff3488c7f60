"""One point of a benchmark, in the process that runs it: ``python -m lowrank.commands.point``, as ``bench`` starts it.

Its input is a JSON object: ``overrides``, ``steps``, ``warmup``, ``started`` (when the process was asked for, seconds
since the epoch) and ``answer``, the file that the row is written to.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lowrank import compose
from lowrank import run as runs
from lowrank.commands.replay import first_steps_of
from lowrank.fast import linear
from lowrank.record import directory, source
from lowrank.record.directory import Log
from lowrank.schema import Config
from lowrank.secrets import redacted_tree
from lowrank.session.identity import machine, versions
from lowrank.session.session import Session
from lowrank.train.metrics import read
from lowrank.train.stopping import Stopping

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")


def measured(overrides: Sequence[str], steps: int, warmup: int, started: float) -> dict[str, Any]:
    """Trains ``warmup`` + ``steps`` steps, evaluates and keeps nothing: what the last ``steps`` took, and on what."""
    config = first_steps_of(compose.compose(list(overrides)), {"steps": warmup + steps})
    with TemporaryDirectory(prefix="lowrank-bench-") as folder, Stopping().installed() as stopping:
        parts, data, loaded = runs.assembled(config, Log())
        session = Session(parts, data, loaded, Path(folder), Log(), None, stopping)
        session.first_steps(warmup + steps)
        finished = time.time()
        rows = [row for row in read(Path(folder) / directory.METRICS) if row["event"] == "step"]
    return {
        **figures(rows, warmup),
        "start_s": finished - started - sum(row["seconds"] for row in rows),  # until the first step, imports and all
        "shapes": shapes(session),
        "fast": session.fast,
        "packed": loaded.packed,
        **conditions(config, session),
    }


def figures(rows: Sequence[dict[str, Any]], warmup: int) -> dict[str, Any]:
    """Of the steps after the warm-up; quartiles where there are four steps or more, else the extremes."""
    timed = rows[warmup:]
    seconds = sorted(row["seconds"] for row in timed)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 3 else [seconds[0], 0.0, seconds[-1]]
    total = sum(seconds)
    return {
        "step_s": statistics.median(seconds),
        "step_s_quartiles": [quartiles[0], quartiles[2]],
        "tokens_per_s": sum(row["real_tokens"] for row in timed) / total,
        "target_tokens_per_s": sum(row["target_tokens"] for row in timed) / total,
        "tokens_a_step": sum(row["real_tokens"] for row in timed) / len(timed),
        "peak_mb": rows[-1]["peak_memory_mb"],
        "loss": timed[-1]["loss"],  # two points that should compute the same can be seen to
    }


def shapes(session: Session) -> dict[str, Any]:
    """The sizes that theory speaks of."""
    config, plan = session.model.config.get_text_config(), session.parts.plan
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    found = {name: getattr(config, name, None) for name in (*names, "vocab_size")}
    counts = {"parameters": plan.total_parameters, "trainable": plan.trainable_parameters, "sites": len(plan.rows)}
    return {**found, **counts}


def conditions(config: Config, session: Session) -> dict[str, Any]:
    return {
        "device": str(session.parts.device),
        "machine": machine(session.parts.device),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "precision": session.parts.precision,
        "versions": versions(),
        "git": source.checkout().to_dict(),
        "config": redacted_tree(config.to_dict()),
    }


def processor() -> dict[str, Any]:
    """The CPU's name, and which of the instructions that matter it has; empty where the system does not say."""
    lines = dict(line.split(":", 1) for line in linear.cpu().splitlines() if ":" in line)
    told = {name.strip(): value.strip() for name, value in lines.items()}
    flags = (told.get("flags") or told.get("Features") or "").split()
    return {"name": told.get("model name", ""), "features": [name for name in FEATURES if name in flags]}


def main() -> None:
    with compose.reporting():
        asked = json.loads(sys.argv[1])
        row = measured(asked["overrides"], asked["steps"], asked["warmup"], asked["started"])
        Path(asked["answer"]).write_text(json.dumps(directory.finite(row)), encoding="utf-8")


if __name__ == "__main__":
    main()
