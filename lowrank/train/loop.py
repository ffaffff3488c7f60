"""The training loop."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowrank.errors import NumericsError
from lowrank.keys import Clock, digest
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.loss import TargetBatch
from lowrank.train.optim import set_lr
from lowrank.train.precision import Precision
from lowrank.train.schedule import Schedule


class MicroBatch(TargetBatch, Protocol):
    @property
    def rows(self) -> tuple[int, ...]: ...
    @property
    def real_tokens(self) -> int: ...
    def to(self, device: torch.device) -> MicroBatch: ...


class Batches(Protocol):
    def at(self, step: int) -> Sequence[MicroBatch]:
        """The micro-batches of an optimizer step, from 1: a pure function."""


@dataclass
class State:
    """All that moves, besides parameters and optimizer: it is what a checkpoint's state.json holds."""

    step: int = 0  # optimizer steps done
    real_tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0


@dataclass
class Loop:
    """``step()`` is one optimizer step; ``run(n)`` makes them until step n."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]  # what trains, by name
    batches: Batches
    loss: Callable[[nn.Module, Any], Tensor]  # summed over a micro-batch's targets
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    precision: Precision
    clock: Clock
    max_norm: float = math.inf  # inf measures the norm and clips nothing
    hooks: Sequence[Hook] = ()
    penalty: Callable[[], Tensor | float] = float  # added once a step
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    state: State = field(default_factory=State)
    stop: bool = False  # set by a signal: finish the step, then leave

    def run(self, steps: int) -> None:
        while self.state.step < steps and not self.stop:
            record = self.step()
            if record is not None:
                for hook in self.hooks:
                    hook.after_step(record)

    def step(self) -> StepRecord | None:
        """One optimizer step, or None where fp16's loss scale overflowed: the same step then comes again."""
        started = time.perf_counter()
        step = self.state.step + 1
        batches = self.batches.at(step)
        targets = sum(len(batch.targets) for batch in batches)  # of the whole step, before the first forward
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        with default_generator_restored():
            for index, batch in enumerate(batches):
                self.clock.set(step, index)
                torch.manual_seed(digest(self.clock.seed, "model dropout", step, index))
                with self.precision.autocast():
                    loss = self.loss(self.model, batch.to(self.device))
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise self.not_finite(step, f"loss is {value}", index, batches)
                self.precision.backward(loss / targets)
                total += value
        penalty = self.penalty()
        if isinstance(penalty, Tensor):
            self.precision.backward(penalty)
        self.precision.unscale(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.max_norm))
        overflowed = self.precision.overflowed(norm)
        if not math.isfinite(norm) and not overflowed:
            raise self.not_finite(step, f"gradient norm is {norm}", None, batches)
        lr = set_lr(self.optimizer, self.schedule(step))
        for hook in self.hooks if not overflowed else ():
            hook.before_update(step)
        self.precision.update(self.optimizer)
        if overflowed:
            return None
        for hook in self.hooks:
            hook.after_update(step)
        real = sum(batch.real_tokens for batch in batches)
        return self.count(step, total / targets, lr, norm, targets, real, time.perf_counter() - started)

    def count(
        self, step: int, loss: float, lr: float, norm: float, targets: int, real: int, seconds: float
    ) -> StepRecord:
        self.state.step = step
        self.state.real_tokens += real
        self.state.target_tokens += targets
        self.state.seconds += seconds
        memory = peak_memory_mb(self.device)
        return StepRecord(step, loss, lr, norm, targets, real, real / seconds, memory, seconds)

    def not_finite(self, step: int, what: str, index: int | None, batches: Sequence[MicroBatch]) -> NumericsError:
        self.optimizer.zero_grad(set_to_none=True)
        rows = batches[index].rows if index is not None else [row for batch in batches for row in batch.rows]
        where = f" in micro-batch {index + 1} of {len(batches)}" if index is not None else ""
        return NumericsError(
            f"step {step}: {what}{where} (rows {show_rows(rows)}). Parameters are those of step {self.state.step}"
        )


def show_rows(rows: Sequence[int]) -> str:
    """``1032–1039`` where they follow one another, else the first few."""
    if len(rows) > 1 and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return f"{rows[0]}–{rows[-1]}"
    return ", ".join(str(row) for row in rows[:16]) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")


@contextmanager
def default_generator_restored() -> Iterator[None]:
    """A model's own dropout draws from torch's default generators: inside they are ours, afterwards as before."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def peak_memory_mb(device: torch.device) -> float:
    """The allocator's peak on CUDA, the process's peak on a CPU, in MB of 10⁶ bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "linux":  # of this process alone: ru_maxrss begins with the peak of the one that started it
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
