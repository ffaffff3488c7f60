"""The training loop."""

from __future__ import annotations

import hashlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowrank.keys import Clock, digest
from lowrank.train import finite
from lowrank.train.finite import Fault, NotFinite
from lowrank.train.guard import Guard
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.loss import TargetBatch
from lowrank.train.optim import set_lr
from lowrank.train.precision import Precision
from lowrank.train.prefetch import ahead
from lowrank.train.schedule import Schedule
from lowrank.train.spikes import WINDOW, spike
from lowrank.train.update import EachParameter, Update


class MicroBatch(TargetBatch, Protocol):
    @property
    def rows(self) -> tuple[int, ...]: ...
    @property
    def real_tokens(self) -> int: ...
    def to(self, device: torch.device) -> MicroBatch: ...
    def pinned(self) -> MicroBatch: ...


class Batches(Protocol):
    def at(self, step: int) -> Sequence[MicroBatch]:
        """The micro-batches of an optimizer step, from 1: a pure function."""


@dataclass
class State:
    """All that moves, besides parameters and optimizer: it is what a checkpoint's state.json holds."""

    step: int = 0  # optimizer steps done
    position: int = 0  # batches consumed, each once: step + skipped
    skipped: int = 0  # batches that gave no step, since something was not finite
    skipped_in_row: int = 0
    real_tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    data_order: str = ""  # a running sha256 over the rows of every batch consumed
    recent: list[float] = field(default_factory=list)  # the last losses, for spikes

    def consume(self, batches: Sequence[MicroBatch]) -> None:
        self.position += 1
        rows = [list(batch.rows) for batch in batches]
        self.data_order = hashlib.sha256(f"{self.data_order}{rows}".encode()).hexdigest()


@dataclass(frozen=True)
class Begun:
    """A step before its first forward."""

    step: int
    batches: Sequence[MicroBatch]
    targets: int  # of the whole step
    guard: Guard
    lr: float


@dataclass(frozen=True)
class Made:
    """A step after its update."""

    loss: float  # mean over the step's targets
    norm: float


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
    max_skipped: int = 0  # batches in a row that may be passed over where something is not finite
    trace: bool = False  # then find the module in which it first was not
    named: Callable[[nn.Module], Iterable[tuple[str, nn.Module]]] = nn.Module.named_modules  # what modules are called
    updating: Callable[[torch.optim.Optimizer], Update] = EachParameter

    def __post_init__(self) -> None:
        self.update = self.updating(self.optimizer)

    def run(self, steps: int) -> None:
        """Raises NotFinite where the finite guard stops it: parameters are then those of the last whole step."""
        with ahead(self):
            while self.state.step < steps and not self.stop:
                try:
                    record = self.step()
                except NotFinite as error:
                    self.skip(error.fault)
                else:
                    self.tell(record)

    def step(self) -> StepRecord | None:
        """One optimizer step, or None where fp16's loss scale overflowed: the same step then comes again."""
        started = time.perf_counter()
        begun = self.begin()
        losses = self.passes(begun)
        made = self.update_by(begun, losses)
        return None if made is None else self.count(begun, made, time.perf_counter() - started)

    def begin(self) -> Begun:
        """What comes before the first forward: the step's batches, no gradients, its learning rate."""
        step = self.state.step + 1
        batches = self.batches.at(self.state.position + 1)
        targets = sum(len(batch.targets) for batch in batches)
        guard = self.guard(step, batches, targets)
        if not self.model.training:  # it goes through every module
            self.model.train()
        self.update.clear()
        return Begun(step, batches, targets, guard, set_lr(self.optimizer, self.schedule(step)))

    def passes(self, begun: Begun) -> list[Tensor]:
        """Forward and backward of each micro-batch: their losses, each summed over its targets."""
        losses = []
        with default_generator_restored():
            for index, batch in enumerate(begun.batches):
                loss = self.forward(begun.step, index, batch)
                losses.append(loss.detach())
                if self.update.at_once:
                    begun.guard.losses(finite.read(losses))
                self.precision.backward(loss / begun.targets)
        return losses

    def update_by(self, begun: Begun, losses: Sequence[Tensor]) -> Made | None:
        """The update that the gradients give, once all that was found on the way to it is finite; None where fp16's
        overflowed."""
        penalty = self.penalty()
        if isinstance(penalty, Tensor):
            self.precision.backward(penalty)
        self.precision.unscale(self.update.gathered())
        norm = self.update.norm()
        *told, pulled, length = finite.read([*losses, penalty, norm])
        begun.guard.losses(told)
        begun.guard.penalty(pulled)
        if begun.guard.overflowed(length):
            self.precision.halve()
            return None
        self.update.clip(self.max_norm, norm, length)
        for hook in self.hooks:
            hook.before_update(begun.step)
        self.update.step()
        self.precision.made()
        begun.guard.updated(begun.lr)
        for hook in self.hooks:
            hook.after_update(begun.step)
        return Made(sum(told) / begun.targets, length)

    def forward(self, step: int, index: int, batch: MicroBatch) -> Tensor:
        """The summed loss of a micro-batch, all randomness keyed: the same bits whenever it is called."""
        self.clock.set(step, index)
        torch.manual_seed(digest(self.clock.seed, "model dropout", step, index))
        with self.precision.autocast():
            return self.loss(self.model, batch.to(self.device))

    def count(self, begun: Begun, made: Made, seconds: float) -> StepRecord:
        targets, real = begun.targets, sum(b.real_tokens for b in begun.batches)
        stands_out, memory = spike(self.state.recent, made.loss), peak_memory_mb(self.device)
        self.state.step += 1
        self.state.consume(begun.batches)
        self.state.skipped_in_row = 0
        self.state.real_tokens += real
        self.state.target_tokens += targets
        self.state.seconds += seconds
        self.state.recent = [*self.state.recent, made.loss][-WINDOW:]
        told = (targets, real, real / seconds, memory, seconds, stands_out)
        return StepRecord(self.state.step, made.loss, begun.lr, made.norm, *told)

    def tell(self, record: StepRecord | None) -> None:
        """The hooks of a step that was made."""
        if record is not None:
            for hook in self.hooks:
                hook.after_step(record)

    def guard(self, step: int, batches: Sequence[MicroBatch], targets: int) -> Guard:
        def again(index: int) -> None:
            with default_generator_restored():
                loss = self.forward(step, index, batches[index])
                if torch.isfinite(loss):
                    self.precision.backward(loss / targets)

        parts = (self.model, self.parameters, self.precision, self.update)
        return Guard(step, batches, *parts, again, self.named, self.trace)

    def skip(self, fault: Fault) -> None:
        """Passes over the batch. Raises NotFinite where that is not wanted, has been done too often or cannot help."""
        if fault.trained:
            raise NotFinite(fault, fault.trained)
        if self.state.skipped_in_row >= self.max_skipped:
            often = f"It is batch {self.max_skipped + 1} in a row (loop.max_skipped). " if self.max_skipped else ""
            weight = finite.damaged(self.model, self.named)
            base = f"{weight}, which does not train, is not finite. " if weight else ""
            raise NotFinite(fault, f"{often}{base}Parameters are those of step {self.state.step}")
        self.state.skipped += 1
        self.state.skipped_in_row += 1
        self.state.consume(self.batches.at(self.state.position + 1))
        for hook in self.hooks:
            if isinstance(hook, Hook):  # a method's own may be any class with the other calls
                hook.after_skip(fault)


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
