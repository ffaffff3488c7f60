"""Our arm, as ``python train.py`` runs it: ``python -m benchmarks.ours FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import lowrank
from benchmarks import task
from benchmarks.arm import Result, peak_mb, token_hash, versions
from lowrank import assemble


def main(folder: Path) -> None:
    work = task.read(folder)
    with TemporaryDirectory(prefix="lowrank-") as outputs:
        run = lowrank.train(work.overrides, Path(outputs, "run"))
        peak = peak_mb(work.device)
        steps = [row for row in run.metrics if row["event"] == "step"]
        summary, predicted = run.summary, predictions(run.folder)
    # What a step sees is a function of the configuration alone: reading it again costs the measurement nothing.
    order = assemble.batches(run.config, assemble.data(run.config, run.tokenizer), run.loaded.collate)
    batches = [order.at(row["step"])[0] for row in steps]
    assert [row["real_tokens"] for row in steps] == [batch.real_tokens for batch in batches]
    Result(
        arm="lowrank",
        losses=[row["loss"] for row in steps],
        lrs=[row["lr"] for row in steps],
        seconds=[row["seconds"] for row in steps],
        real_tokens=[row["real_tokens"] for row in steps],
        positions=[batch.inputs["input_ids"].numel() for batch in batches],
        token_hashes=[token_hash(real(batch.inputs)) for batch in batches],
        trainable_parameters=summary["trainable_parameters"],
        peak_mb=peak,
        threads=torch.get_num_threads(),
        versions=versions(["lowrank", "torch", "transformers"]),
        predicted=predicted,
        note=str(summary.get("fast", "")),
    ).print()


def predictions(folder: Path) -> dict[str, Any]:
    """What the run's ledger expected, where it wrote one."""
    path = folder / "ledger.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("predicted", {}) if path.is_file() else {}
    return {name: found[name] for name in ("peak_mb", "tokens_per_s") if found.get(name)}


def real(inputs: dict[str, torch.Tensor]) -> list[int]:
    """The tokens of a pack, or of padded rows without their padding."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return (ids[mask.bool()] if mask.shape == ids.shape else ids[0]).tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
