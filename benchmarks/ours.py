"""Our arm of ``vs_peft.py``, as ``python train.py`` runs it: ``python -m benchmarks.ours FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import lowrank
from benchmarks import task
from benchmarks.arm import Result, peak_rss_mb, token_hash, versions
from lowrank import assemble


def main(folder: Path) -> None:
    with TemporaryDirectory(prefix="lowrank-") as outputs:
        run = lowrank.train(task.read(folder).overrides, Path(outputs, "run"))
        peak = peak_rss_mb()
        steps = [row for row in run.metrics if row["event"] == "step"]
        parameters = run.summary["trainable_parameters"]
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
        trainable_parameters=parameters,
        peak_rss_mb=peak,
        threads=torch.get_num_threads(),
        versions=versions(["lowrank", "torch", "transformers"]),
    ).print()


def real(inputs: dict[str, torch.Tensor]) -> list[int]:
    """The tokens of a pack, or of padded rows without their padding."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return (ids[mask.bool()] if mask.shape == ids.shape else ids[0]).tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
