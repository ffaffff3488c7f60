"""The loss alone, with its gradient: ``python -m benchmarks.loss_layer FOLDER ROWS VOCABULARY WIDTH plain|chunks``.

Prints the memory that it took above its inputs and its result, in MB, and its seconds beside those of the two products
that it cannot do without: W h, and Wᵀ times the gradient of the logits.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import task
from benchmarks.arm import now, peak_mb
from lowrank.fast import linear
from lowrank.fast.loss import Head, head_loss

REPEATS = 3


def main(folder: Path, rows: int, vocabulary: int, width: int, how: str) -> None:
    work = task.read(folder)
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    generator = torch.Generator(work.device).manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, device="meta", dtype=dtype).to_empty(device=work.device)
    head.weight.data.normal_(0, 0.02, generator=generator)
    head.requires_grad_(False)
    h = torch.randn(rows, width, device=work.device, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device=work.device, generator=generator)
    losses: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: F.cross_entropy(head(h).float(), targets, reduction="sum"),
        "chunks": lambda: head_loss(h, targets, Head(head)),
    }
    before, seconds, loss = held_mb(work.device), [], h.new_zeros(())
    for _ in range(REPEATS):
        h.grad, started = None, now(work.device)
        loss = losses[how]()
        loss.backward()
        seconds.append(now(work.device) - started)
    figures = {
        "extra_mb": peak_mb(work.device) - before,
        "seconds": statistics.median(seconds),
        "products": products(h.detach(), head.weight, work.device),
        "loss": float(loss),
    }
    print(json.dumps(figures), flush=True)


def held_mb(device: str) -> float:
    """What is held now: the peak from here on is compared with it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    return peak_mb(device)


def products(h: Tensor, weight: Tensor, device: str) -> float:
    """Median seconds of the two products, by rows that fit in as many bytes of logits as a chunk of the loss."""
    seconds, rows = [], max(256, (64 << 20) // (4 * len(weight)))
    for _ in range(REPEATS):
        started = now(device)
        for part in h.split(rows):
            linear.product(linear.product(part, weight), weight.T)
        seconds.append(now(device) - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5])
