"""Small real training runs: a tiny model, LoRA, packed documents and the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from documents import texts
from torch import Tensor, nn

from lowrank.adapters import LoRA
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import plan
from lowrank.data.order import Batches
from lowrank.data.pack import pack
from lowrank.keys import Clock, key
from lowrank.models import attention
from lowrank.train.loop import Loop
from lowrank.train.loss import target_loss
from lowrank.train.optim import groups
from lowrank.train.precision import Precision
from lowrank.train.schedule import schedule
from lowrank.train.update import EachParameter, Update

CPU = torch.device("cpu")
UPDATING: list[Callable[[torch.optim.Optimizer], Update]] = [EachParameter]  # the last is what a loop takes
LENGTHS = [5, 12, 3, 9, 14, 2, 7, 7, 4, 11, 6, 8]


def order_of(**changes: Any) -> Batches:
    """Twelve documents of unequal length and numbers of targets, six a step in micro-batches of two."""
    options = {"seed": 0, "micro_batch": 2, "micro_batch_tokens": None, "accumulate": 3}
    return Batches(texts(LENGTHS), pack, **{**options, **changes})


def adapted(model: nn.Module, clock: Clock, *, dropout: float = 0.0) -> nn.Module:
    """``model`` with packed attention and LoRA whose B is not zero, so that A has gradients from the first step.

    Adapters over an fp64 model are made fp64 too, as an oracle needs them.
    """
    dtype = next(model.parameters()).dtype
    assert attention.install(model) is None
    apply(model, plan(model, {"all-linear": partial(LoRA, r=2, dropout=dropout)}), clock=clock)
    for name, parameter in named_trainable(model).items():
        if name.endswith(".B"):
            parameter.data.normal_(0, 0.1, generator=key(0, name))
    return model.double() if dtype == torch.float64 else model


def adamw(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(parameters, [], lr=1e-2, weight_decay=0.1))


def loop_of(
    model: nn.Module,
    *,
    dropout: float = 0.0,
    order: Batches | None = None,
    updating: Callable[[torch.optim.Optimizer], Update] | None = None,
    optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer] = adamw,
    precision: str = "fp32",
    loss: Callable[[nn.Module, Any], Tensor] = target_loss,
    **changes: Any,
) -> Loop:
    """A loop over ``model``, which is given its adapters here; its own dropout follows its config."""
    clock = Clock(seed=3)
    parameters = named_trainable(adapted(model, clock, dropout=dropout))
    return Loop(
        model=model,
        parameters=parameters,
        batches=order or order_of(),
        loss=loss,
        optimizer=optimizer(parameters),
        schedule=changes.pop("schedule", schedule("linear", warmup=2, total=10)),
        precision=Precision(precision, CPU),
        clock=clock,
        updating=updating or UPDATING[-1],
        **changes,
    )


def values(loop: Loop) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in loop.parameters.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def rows_of(order: Batches, step: int) -> list[Sequence[int]]:
    return [batch.rows for batch in order.at(step)]
