"""Bytes that a step keeps between forward and backward, counted: ``python -m benchmarks.saved FOLDER``.

The run of ``python train.py``, with a hook on every tensor that autograd saves. A storage counts once however many
tensors look at it, from its first saving until the last of those is let go, and parameters do not count. Printed is
the most of it at once over the steps, beside the formula of ``predict.py`` for the largest of them.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import lowrank
from benchmarks import predict, task
from benchmarks.arm import peak_mb
from benchmarks.shapes import SHAPES, SMOLLM2
from lowrank.train.loop import Loop


class Held:
    """What autograd holds in place of a tensor: seen when it is let go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Saved:
    """Every saving and letting go, in order, of storages that are no parameters'."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []  # (storage, its bytes, or less than 0 where it is let go)
        self.own: set[int] = set()

    def begin(self, model: nn.Module) -> None:
        """Counts from here on; what is let go of what was saved before goes to the old list."""
        self.events = []
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(self, tensor: Tensor) -> Held:
        held, storage = Held(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.own or not size:
            return held
        self.events.append((place, size))
        weakref.finalize(held, self.events.append, (place, -size))
        return held

    def unpack(self, held: Held) -> Tensor:
        return held.tensor

    @property
    def most(self) -> int:
        """The most bytes at once."""
        holders: Counter[int] = Counter()
        total = peak = 0
        for place, size in self.events:
            before = holders[place]
            holders[place] += 1 if size > 0 else -1
            if not before or not holders[place]:
                total += size
            peak = max(peak, total)
        return peak


@contextmanager
def counting(saved: Saved) -> Iterator[None]:
    """From the loop's first step: the checks before it run on the plain path."""
    run = Loop.run

    def counted(self: Loop, steps: int) -> None:
        saved.begin(self.model)
        run(self, steps)

    Loop.run = counted  # type: ignore[method-assign]
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            yield
    finally:
        Loop.run = run  # type: ignore[method-assign]


def main(folder: Path) -> None:
    work, saved = task.read(folder), Saved()
    with TemporaryDirectory(prefix="lowrank-") as outputs:
        with counting(saved):
            run = lowrank.train(work.overrides, Path(outputs, "run"))
        tokens = [row["real_tokens"] for row in run.metrics if row["event"] == "step"]
        targets = [row["target_tokens"] for row in run.metrics if row["event"] == "step"]
        note = run.summary.get("fast", "")
    shape = SMOLLM2 if work.model == "smollm2" else SHAPES[work.model]
    size = 2 if work.precision == "bf16" else 4
    figures = {
        "saved_mb": saved.most / 1e6,
        "formula_mb": max(tokens) * predict.saved_bytes(shape, size) / 1e6,
        "tokens": max(tokens),
        "targets": max(targets),
        "peak_mb": peak_mb(work.device),
        "note": note,
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
