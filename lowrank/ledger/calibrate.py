"""Tokens a second, expected from ten seconds on this machine (measure.py), and kept for the next time."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lowrank.assemble import Data, Parts
from lowrank.errors import out_of_memory
from lowrank.ledger.measure import rounds
from lowrank.models import load as models
from lowrank.models.cache import cache
from lowrank.record import source
from lowrank.record.directory import write_json

FEW, ENOUGH = 3, 8  # rounds at least; rounds after which a small spread ends it early
NARROW = 0.01  # such a standard error of the median


@dataclass(frozen=True)
class Speed:
    """Real tokens a second: the median over rounds, and the quartiles; ``seconds`` that it took to measure."""

    tokens_per_s: float
    low: float
    high: float
    rounds: int
    seconds: float

    def __str__(self) -> str:
        half = (self.high - self.low) / 2 / self.tokens_per_s
        return f"expected {self.tokens_per_s:,.0f} tokens/s (± {half:.0%}, {self.rounds} rounds on this machine)"


def calibrate(parts: Parts, data: Data | None = None, seconds: float = 10) -> Speed:
    """What this machine makes of the run that ``parts`` describes, kept for the next time it is asked.

    ``data`` gives the packs; without it they are of documents of ``data.max_length``. ``seconds`` are kept to but for
    three rounds, which it always takes.
    """
    known = cached(parts, data)
    if known is None:
        known = measured(parts, data, seconds)
        path = place(parts, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(known))
    return known


def expected(parts: Parts, data: Data | None = None) -> Speed | None:
    """``calibrate``, or None where this machine has not the memory for a few of the model's blocks."""
    try:
        return calibrate(parts, data)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return None


def cached(parts: Parts, data: Data | None = None) -> Speed | None:
    """What a calibration of the very same has found before; None where there was none."""
    try:
        return Speed(**json.loads(place(parts, data).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def measured(parts: Parts, data: Data | None, seconds: float) -> Speed:
    started, rates = time.perf_counter(), list[float]()
    for rate in rounds(parts, data):
        rates.append(rate)
        if enough(rates, time.perf_counter() - started, seconds):
            break
    low, middle, high = statistics.quantiles(rates, n=4)
    return Speed(1 / middle, 1 / high, 1 / low, len(rates), time.perf_counter() - started)


def enough(rates: Sequence[float], passed: float, seconds: float) -> bool:
    """Whether the median is known well enough, or the time is up."""
    if len(rates) < FEW:
        return False
    low, middle, high = statistics.quantiles(rates, n=4)
    error = 1.25 * (high - low) / 1.35 / len(rates) ** 0.5  # of a median, the spread taken to be normal
    return passed >= seconds or (len(rates) >= ENOUGH and error < NARROW * middle)


def place(parts: Parts, data: Data | None) -> Path:
    """Where the speed is kept of what it depends on: machine, code, model, plan, settings and lengths."""
    config = parts.config
    loop = {
        name: value
        for name, value in asdict(config.loop).items()
        if name not in ("steps", "epochs", "max_seconds", "patience", "average", "on_nonfinite", "max_skipped")
        and name not in ("prune", "diverged")
    }
    lengths = [(len(e.tokens), sum(e.target)) for e in data.train] if data else config.data.max_length
    depends = [
        *(machine(parts.device), torch.__version__, torch.get_num_threads(), parts.precision, str(parts.dtype)),
        *(models.config(config.model).to_json_string(), parts.plan.to_dict(), asdict(config.quant)),
        *(config.optim.target, config.optim.options, loop, lengths, source.code_hash(source.package_files())),
    ]
    return cache() / "calibrations" / f"{hashlib.sha256(repr(depends).encode()).hexdigest()[:32]}.json"


def machine(device: torch.device) -> str:
    """This machine, not its type: how fast it is depends on its clock and its memory too."""
    if device.type == "cuda":
        return f"{platform.node()} {torch.cuda.get_device_name(device)}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{platform.node()} {platform.machine()} {model} {os.cpu_count()}"
