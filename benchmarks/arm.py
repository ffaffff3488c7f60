"""What an arm of a comparison reports of itself: one JSON line on standard output, its last."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path


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
    peak_rss_mb: float
    threads: int
    versions: dict[str, str]

    def tokens_per_s(self, warmup: int) -> float:
        return sum(self.real_tokens[warmup:]) / sum(self.seconds[warmup:])

    def seconds_a_step(self, warmup: int) -> float:
        return sum(self.seconds[warmup:]) / len(self.seconds[warmup:])

    def print(self) -> None:
        print(json.dumps(asdict(self)), flush=True)


def read(output: str) -> Result:
    """The result that a process printed; libraries may have printed before it."""
    return Result(**json.loads(output.splitlines()[-1]))


def token_hash(tokens: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()[:16]


def peak_rss_mb() -> float:
    """The most memory this process ever held, in MB of 10⁶ bytes.

    Linux's VmHWM: ``getrusage`` would begin with the peak of the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {package: version(package) for package in packages}
