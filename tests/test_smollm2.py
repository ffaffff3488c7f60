"""The main job on the real model and the real data, three steps long, through ``train.py``."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SMALL = [
    "loop.steps=3",
    "loop.micro_batch=4",
    "eval.limit=8",
    "eval.generate.limit=2",
    "eval.generate.max_new_tokens=8",
    "checkpoint.every=2",
]


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_three_steps_of_lora_on_smollm2(quant: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), f"quant={quant}", *SMALL, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["trainable_parameters"] == 4_884_480  # r=16 on the seven projections of 30 layers
    assert summary["total_parameters"] == 134_515_008  # logical, whatever the quantisation
    assert summary["packed"]
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    assert 2 < after["loss"] < before["loss"] < 5  # a trained model's loss on unseen text, and it falls
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert sum(row["real_tokens"] for row in steps) == summary["real_tokens"]
    trained = load_file(folder / "adapter" / "adapter.safetensors")
    assert len(trained) == 420
    assert all(tensor.isfinite().all() for tensor in trained.values())
    assert all(torch.count_nonzero(t) for name, t in trained.items() if name.endswith("adapter.B"))
    assert [path.name for path in sorted((folder / "checkpoints").glob("step-*"))] == ["step-00000002", "step-00000003"]
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert "held-out loss" in done.stdout
    assert ("nf4: 210 linear weights" in done.stderr) == (quant == "nf4")
