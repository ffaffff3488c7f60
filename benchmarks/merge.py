"""What survives of a run's adapter when it is merged: dense, and into NF4 by either method.

    python benchmarks/merge.py RUN

Prints a table, a row a model: the share of the adapter's effect on the logits of held-out tokens,
1 − ‖merged − wrapped‖ / ‖wrapped − base‖; the held-out loss of a target token (over the first ``--examples`` held-out
examples, as the run evaluates them); its perplexity; the 4-bit codes that changed; and how long the merge took, its
measuring included. Codes are chosen on 64 rows of 128 training tokens, the share is that of 16 rows of held-out ones.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import lowrank
from lowrank import assemble
from lowrank.adapters.effect import without_adapters
from lowrank.eval.heldout import held_out
from lowrank.train.loss import target_loss

HEADER = """| model | share | held-out loss | perplexity | codes changed | seconds (of CPU) |
| --- | ---: | ---: | ---: | ---: | ---: |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--examples", type=int, default=100, help="held-out examples for the loss (100)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch (all)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = lowrank.open(arguments.run)
    loss = evaluation(run, arguments.examples)
    print(HEADER)
    for line in lines(run, loss):
        print(line, flush=True)


def evaluation(run: Any, examples: int) -> Callable[[Any], dict[str, float]]:
    """Held-out loss and perplexity of a model on the run's own held-out examples."""
    held = assemble.data(run.config, run.tokenizer).eval[:examples]
    batches = [run.loaded.collate(held[i : i + 8]) for i in range(0, len(held), 8)]
    return lambda model: held_out(model, batches, target_loss, nullcontext)


def lines(run: Any, loss: Callable[[Any], dict[str, float]]) -> Iterator[str]:
    model, found = run.model, run.probes()
    probes = {name: found[name] for name in ("probe", "calibration")}
    with without_adapters(model):
        yield line("base", loss(model), share="0")
    yield line("wrapped", loss(model), share="1")
    for to, method in (("dense", "best"), ("nf4", "naive"), ("nf4", "best")):
        began, busy = time.perf_counter(), time.process_time()
        merged, report = lowrank.merge(model, to=to, method=method, min_share=None, **probes)
        seconds = f"{time.perf_counter() - began:.0f} ({time.process_time() - busy:.0f})"
        flipped = [site.flipped for site in report.sites if site.flipped is not None]
        changed = f"{sum(flipped) / len(flipped):.2%}" if flipped else ""
        name = to if to == "dense" else f"{to}, {method}"
        yield line(name, loss(merged), f"{report.share:.3f}", changed, seconds)
        del merged


def line(name: str, figures: dict[str, float], share: str, changed: str = "", seconds: str = "") -> str:
    loss, perplexity = figures["loss"], figures["perplexity"]
    return f"| {name} | {share} | {loss:.4f} | {perplexity:.2f} | {changed} | {seconds} |"


if __name__ == "__main__":
    main()
