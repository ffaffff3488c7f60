"""What an arm of a comparison reports of itself: one JSON line on standard output, its last."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Result:
    """One process's run. Lists have an entry for each optimizer step, warm-up steps included."""

    arm: str
    losses: list[float]  # mean over the step's target tokens
    lrs: list[float]
    seconds: list[float]
    real_tokens: list[int]  # padding never counts
    positions: list[int]  # that the model computed, padding included
    token_hashes: list[str]  # of the step's real tokens, document after document
    trainable_parameters: int
    peak_mb: float  # the process's on a CPU, the allocator's on CUDA; MB of 10⁶ bytes
    threads: int
    versions: dict[str, str]
    predicted: dict[str, Any] = field(default_factory=dict)  # of the run's ledger, before it was measured
    note: str = ""  # what was fast and what was not

    def tokens_per_s(self, warmup: int) -> float:
        return sum(self.real_tokens[warmup:]) / sum(self.seconds[warmup:])

    def print(self) -> None:
        print(json.dumps(asdict(self)), flush=True)


def read(output: str) -> Result:
    """The result that a process printed; libraries may have printed before it."""
    return Result(**json.loads(output.splitlines()[-1]))


def token_hash(tokens: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()[:16]


def peak_mb(device: str) -> float:
    """The most memory this process ever held: the allocator's peak on CUDA, else Linux's VmHWM.

    ``getrusage`` would begin with the peak of the process that started this one.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def now(device: str) -> float:
    """Seconds of a clock that only goes on; on CUDA, when all that was asked for is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {package: version(package) for package in packages}
