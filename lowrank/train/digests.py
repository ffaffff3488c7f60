"""``digests.jsonl``: what every tensor that trains was, bit for bit, after the first steps and then now and again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.metrics import Lines

FIRST = 20  # steps of which each has its row
LARGE = 1 << 28  # bytes that train: hashing them at each of the first steps would be felt
SPARSE = (1, 2, 5, 10, 20)  # so of these only
DIGITS = 16  # of a tensor's sha256


class Digests(Lines, Hook):
    """A row for step 0, which also tells the steps of the whole schedule, and for each of the first steps, every
    ``every``-th (0: none more), and the last: ``last``, or whichever step ``ended`` is true of."""

    def __init__(
        self, path: Path, trained: Mapping[str, Tensor], *, every: int, last: int, ended: Callable[[int], bool]
    ) -> None:
        super().__init__(path)
        self.trained, self.every, self.last, self.ended = trained, every, last, ended
        large = sum(tensor.nbytes for tensor in trained.values()) > LARGE
        self.first = SPARSE if large else range(1, FIRST + 1)

    def begin(self) -> None:
        """Of a run that starts at its first step."""
        self.write({"step": 0, "steps": self.last, "tensors": digests(self.trained)})

    def after_step(self, record: StepRecord) -> None:
        step = record.step
        if step in self.first or step == self.last or (self.every and step % self.every == 0) or self.ended(step):
            self.write({"step": step, "tensors": digests(self.trained)})


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The first 16 hexadecimal digits of the SHA-256 of each tensor's bytes, by name."""
    return {name: hashlib.sha256(raw).hexdigest()[:DIGITS] for name, raw in raw_bytes(tensors)}


def digest_of_all(tensors: Mapping[str, Tensor]) -> str:
    """One SHA-256 over names and bytes of all, in the order of the names."""
    found = hashlib.sha256()
    for name, raw in raw_bytes(dict(sorted(tensors.items()))):
        found.update(f"{name} {len(raw)}\n".encode())
        found.update(raw)
    return found.hexdigest()


def raw_bytes(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """Names and bytes. What lies on a GPU comes to the host at once: the GPU is waited for a single time."""
    flat = {name: t.detach().contiguous().reshape(-1).view(torch.uint8) for name, t in tensors.items()}
    there = [raw for raw in flat.values() if raw.is_cuda]
    host = torch.empty(sum(len(raw) for raw in there), dtype=torch.uint8, pin_memory=bool(there))
    pieces = iter(host.split([len(raw) for raw in there]))
    for name, raw in flat.items():
        if raw.is_cuda:
            flat[name] = next(pieces).copy_(raw, non_blocking=True)
    for device in {raw.device for raw in there}:
        torch.cuda.current_stream(device).synchronize()
    for name, raw in flat.items():
        array: Any = raw.numpy()
        yield name, memoryview(array)


def unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first tensor, in the order of ``one``, of which two rows tell different bits; None where they are equal."""
    names = [*one["tensors"], *(name for name in other["tensors"] if name not in one["tensors"])]
    return next((n for n in names if one["tensors"].get(n) != other["tensors"].get(n)), None)
