"""The finite guard of one optimizer step: what is not finite reaches neither weights nor optimizer nor hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from lowrank.train import finite
from lowrank.train.finite import Fault, NotFinite
from lowrank.train.precision import Precision
from lowrank.train.trace import tracing
from lowrank.train.update import Update


class Rows(Protocol):
    @property
    def rows(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Guard:
    """Every method raises NotFinite, saying where, or lets the step go on."""

    step: int
    batches: Sequence[Rows]
    model: nn.Module
    parameters: Mapping[str, nn.Parameter]  # what trains
    precision: Precision
    update: Update
    again: Callable[[int], None]  # forward and backward of one micro-batch, counted from 0: the same bits as before
    named: Callable[[nn.Module], Iterable[tuple[str, nn.Module]]]  # modules and what they are called
    trace: bool  # also find the module

    def losses(self, values: Sequence[float]) -> None:
        """Of the micro-batches, in their order."""
        for index, value in enumerate(values):
            if not math.isfinite(value):
                raise NotFinite(self.fault(f"loss is {value}", index))

    def penalty(self, value: float) -> None:
        if not math.isfinite(value):
            raise NotFinite(self.fault(f"penalty is {value}"))

    def overflowed(self, norm: float) -> bool:
        """Whether a gradient is not finite and fp16's loss scale may be why: the step is then tried at half of it."""
        if math.isfinite(norm):
            return False
        faults = self.update.bad()
        if self.update.at_once:
            moved = "Parameters that backward had come to before have moved (optim.in_backward): they are of no step"
            raise NotFinite(replace(self.fault(finite.told(faults, norm)), trained=moved))
        if faults and self.precision.may_halve():
            return True
        passes = [lambda index=index: self.again(index) for index in range(len(self.batches))] if faults else []
        index = finite.culprit(self.parameters, passes)
        alone = "; that of no micro-batch is by itself" if faults and index is None else ""
        raise NotFinite(self.fault(f"{finite.told(faults, norm)}{alone}", index))

    def updated(self, lr: float) -> None:
        """Raises where the update made a parameter not finite: they are then lost, and are never saved."""
        if not math.isfinite(self.update.size()):
            for name, how in finite.bad(self.parameters).items():
                what = f"parameters are not finite after the update at learning rate {lr:g}"
                raise NotFinite(replace(self.fault(what), trained=f"{name} is {how}"))

    def fault(self, what: str, index: int | None = None) -> Fault:
        """All that can be found out. Gradients are gone afterwards, and what fp16's scaler knew of them."""
        traced = ""
        if self.trace and index is not None:
            with tracing(self.named(self.model)) as trace:
                self.again(index)
            traced = str(trace)
        finite.drop(self.parameters)
        self.precision.forget()
        trained = next((f"{name} is {how}" for name, how in finite.bad(self.parameters).items()), "")
        known = self.batches if index is None else [self.batches[index]]
        return Fault(
            self.step,
            what,
            rows=tuple(row for batch in known for row in batch.rows),
            micro_batch=None if index is None else index + 1,
            micro_batches=len(self.batches),
            module=traced,
            trained=f"{trained} since before the first step" if trained and self.step == 1 else trained,
        )
