"""The finite guard: NaN and infinity are stopped where they appear, and what is said of them leads to where they arose.

Nothing here moves a weight. A step that is sound costs two waits for the device: before its update, for losses, penalty
and norm together, and after it, for the norm of what it has made of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import NumericsError


@dataclass(frozen=True)
class Fault:
    """What was not finite in an optimizer step, and where it shows. Its text is the first part of the message."""

    step: int
    what: str  # ``loss is nan``
    rows: tuple[int, ...]  # of the micro-batch or, where that is unknown, of the whole step
    micro_batch: int | None = None  # from 1
    micro_batches: int = 1
    module: str = ""  # where tracing found it first
    trained: str = ""  # which parameter that trains is not finite itself, if one is: no other batch can help

    def __str__(self) -> str:
        where = f" in micro-batch {self.micro_batch} of {self.micro_batches}" if self.micro_batch else ""
        return f"step {self.step}: {self.what}{where} (rows {show_rows(self.rows)}).{self.module and f' {self.module}'}"

    def to_dict(self) -> dict[str, Any]:
        """A ``skipped`` row of metrics.jsonl."""
        told = asdict(self)
        kept = ("step", "what", "micro_batch", "rows") + (("module",) if self.module else ())
        return {"event": "skipped", **{name: told[name] for name in kept}}


class NotFinite(NumericsError):
    """Raised out of a step by the guard: neither parameters nor optimizer nor hooks have seen what was not finite.

    Only where an update itself made a parameter not finite (``fault.trained`` names it) are the parameters lost.
    """

    def __init__(self, fault: Fault, more: str = "") -> None:
        super().__init__(f"{fault} {more}".rstrip())
        self.fault = fault


def kind(value: float | Tensor) -> str:
    """``nan`` or ``inf`` where a number, or an entry of a tensor, is not finite; else empty."""
    if isinstance(value, Tensor):
        if not (value.is_floating_point() or value.is_complex()) or bool(torch.isfinite(value).all()):
            return ""
        return "nan" if bool(torch.isnan(value).any()) else "inf"
    return "" if math.isfinite(value) else "nan" if math.isnan(value) else "inf"


def read(values: Sequence[float | Tensor]) -> list[float]:
    """Numbers, wherever they are, at the host: it waits for a device once, however many there are."""
    tensors = [value.detach().reshape(1) for value in values if isinstance(value, Tensor)]
    wide = torch.cat([one.to(tensors[0].device) for one in tensors]).double() if tensors else torch.empty(0)
    told = iter(wide.tolist())
    return [next(told) if isinstance(value, Tensor) else value for value in values]


def gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


def bad(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """name → ``nan`` or ``inf`` of every tensor with an entry that is not finite, in their order."""
    return {name: found for name, tensor in tensors.items() if (found := kind(tensor.detach()))}


def told(faults: Mapping[str, str], norm: float | Tensor) -> str:
    """``gradient of NAME is nan (and of 3 more parameters)``: the last of them, which backward came to first."""
    if not faults:
        return f"gradient norm is {kind(norm)} (each entry is finite, their squares are too large)"
    *others, name = faults
    more = f" (and of {len(others)} more parameters)" if others else ""
    return f"gradient of {name} is {faults[name]}{more}"


def culprit(parameters: Mapping[str, nn.Parameter], passes: Sequence[Callable[[], None]]) -> int | None:
    """The first of the passes, each a forward and a backward, whose own gradient is not finite; None where each is
    finite by itself. Gradients are gone afterwards."""
    found = None
    for index, once in enumerate(passes):
        drop(parameters)
        once()
        if bad(gradients(parameters)):
            found = index
            break
    drop(parameters)
    return found


def drop(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = None


def damaged(model: nn.Module, named: Callable[[nn.Module], Iterable[tuple[str, nn.Module]]]) -> str:
    """The first weight that does not train and is not finite, as a broken file would have it; empty where all are."""
    for path, module in named(model):
        for name, weight in module.named_parameters(recurse=False):
            if not weight.requires_grad and kind(weight):
                return f"{path}.{name}" if path else name
    return ""


def show_rows(rows: Sequence[int]) -> str:
    """``1032–1039`` where they follow one another, else the first few."""
    if len(rows) > 1 and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return f"{rows[0]}–{rows[-1]}"
    return ", ".join(str(row) for row in rows[:16]) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
