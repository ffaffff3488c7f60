"""A finished tiny run, trained once, and copies of it under other settings: what a sweep leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from cli import SMALL

from lowrank import compose, run
from lowrank.compare.keys import flat

FILES = ("config.yaml", "summary.json", "metrics.jsonl", "identity.json", "events.log", "plan.txt")


def trained(folder: Path, rows: Path) -> Path:
    """A run of six steps with an evaluation every other one."""
    more = ["model=tiny_llama", f"data.path={rows}", "loop.steps=6", "eval.every=2", "eval.generate.limit=0"]
    small = [word for word in SMALL if not word.startswith("eval.generate.limit")]
    run.train(compose.compose([*small, *more]), folder, "python train.py model=tiny_llama")
    return folder


def copied(original: Path, folder: Path, loss: float | None = None, **keys: Any) -> Path:
    """The same run with some settings (``adapter__r=8``) and another held-out loss."""
    folder.mkdir(parents=True)
    for name in FILES:
        shutil.copy(original / name, folder / name)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in keys.items():
        *path, last = name.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    told = json.loads((folder / "identity.json").read_text())
    told["identity"] |= {name: value for name, value in flat(config).items() if name in told["identity"]}
    told["identity"] |= {"loop.precision": "fp32", "loop.device": "cpu", "model.dtype": "fp32"}
    (folder / "identity.json").write_text(json.dumps(told))
    summary = json.loads((folder / "summary.json").read_text())
    change(folder, eval=summary["eval"] | {"after": summary["eval"]["after"] | {"loss": loss}})
    return folder


def change(folder: Path, **fields: Any) -> None:
    """Of a run's summary."""
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def grid(original: Path, folder: Path) -> Path:
    """Two ranks by two learning rates by three seeds; rank 8 is 0.5 better and 0.01, 0.02, 0.03 more so by seed."""
    for rank in (4, 8):
        for rate in (1e-3, 1e-2):
            for seed in range(3):
                loss = 3.0 + 10 * rate + 0.1 * seed - (0.5 + 0.01 * (seed + 1)) * (rank == 8)
                name = f"r={rank},lr={rate},seed={seed}"
                made = copied(original, folder / name, loss, adapter__r=rank, optim__lr=rate, loop__seed=seed)
                change(made, trainable_parameters=1000 * rank)
    return folder
