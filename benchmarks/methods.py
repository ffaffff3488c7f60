"""The table of methods from the runs of one sweep: `python benchmarks/methods.py FOLDER`; README.md has the sweep."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

HEAD = (
    "| method | lr | held-out loss | ROUGE-L | trainable parameters | adapter file | tokens/s | peak memory |"
    "\n|---|---|---|---|---|---|---|---|"
)


def finished(folder: Path) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """(method, summary, run directory) of every job that is done: its name is the end of its `experiment`."""
    for path in sorted(folder.glob("*/summary.json")):
        summary = json.loads(path.read_text())
        if summary["status"] == "done":
            yield name_of(path.parent), summary, path.parent


def name_of(run: Path) -> str:
    """``experiment=methods-lora_fa-1a2b…`` → lora_fa: the folder's name begins with its override."""
    return run.name.partition("methods")[2].lstrip("-_/").rsplit("-", 1)[0] or run.name


def row(method: str, summary: dict[str, Any], run: Path) -> str:
    config = yaml.safe_load((run / "config.yaml").read_text())
    after = summary["eval"]["after"]
    cells = (
        method,
        f"{config['optim']['lr']:g}",
        f"{after['loss']:.3f}",
        f"{after['rougeL']:.1f}",
        f"{summary['trainable_parameters']:,}",
        size((run / "adapter/adapter.safetensors").stat().st_size),
        f"{summary['tokens_per_s']:.0f}",
        f"{summary['peak_memory_mb']:,.0f} MB",
    )
    return f"| {' | '.join(cells)} |"


def size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


if __name__ == "__main__":
    runs = sorted(finished(Path(sys.argv[1])), key=lambda found: found[1]["eval"]["after"]["loss"])
    first = runs[0][1]["eval"]["before"]
    print(f"the untouched model: held-out loss {first['loss']:.3f}, ROUGE-L {first['rougeL']:.1f}\n\n{HEAD}")
    for found in runs:
        print(row(*found))
