"""A LoRA of another rank, on paper: what its plan's row and its tensors are then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapter
from lowrank.adapters.plan import InjectionPlan, Row, resolve
from lowrank.errors import RefusedError


def scale_of(row: Row) -> float:
    """s of h = W x + s·B A x, as the row's class has it for these options."""
    made: Any = on_paper(row, {name: value for name, value in row.options.items() if name != "init"})
    return float(made.scale)


def on_paper(row: Row, options: Mapping[str, Any]) -> Adapter:
    """The row's adapter without values, on a layer of its site's shape. Raises what the constructor raises."""
    out, into = row.shape
    with torch.device("meta"):
        base = nn.Linear(into, out, bias=False)
        return resolve(row.adapter)(base, generator=torch.Generator("cpu"), **options)


def of_rank(options: Mapping[str, Any], scale: float, r: int) -> dict[str, Any]:
    """The options with rank r, and with the alpha that leaves the scale as it is."""
    return {**options, "r": r, "alpha": scale * (math.sqrt(r) if options.get("rslora") else r)}


def on_original_base(plan: InjectionPlan, tensors: Mapping[str, Tensor]) -> tuple[InjectionPlan, dict[str, Tensor]]:
    """The same adapter for the base as it was before the adapter's start changed it.

    Where the start took s·B0 A0 out of W (PiSSA, arXiv 2404.02948; OLoRA), the sum W + s·(B A − B0 A0) is a plain
    LoRA of twice the rank: A and A0 above one another, B beside −B0. Raises RefusedError where the changed base was
    quantised anew: what that rounded away is in no factor.
    """
    rows, found = [], dict(tensors)
    for row in plan.rows:
        A, B, A0, B0 = (f"{row.path}.adapter.{name}" for name in ("A", "B", "A0", "B0"))
        if not (alike(tensors, A, A0) and alike(tensors, B, B0)):  # a damaged one is refused when it is loaded
            rows.append(row)
            continue
        if row.kind == "NF4Linear" or row.options.get("init") == "loftq":
            raise RefusedError(
                f"{row.path}: its start took a part out of the base and quantised the rest anew, so it stands on a "
                f"base of its own and cannot share one."
            )
        found[A] = torch.cat([tensors[A], found.pop(A0)])  # (2r, in)
        found[B] = torch.cat([tensors[B], -found.pop(B0)], dim=1)  # (out, 2r)
        options = {name: value for name, value in row.options.items() if name != "init"}
        options = of_rank(options, scale_of(row), len(found[A]))
        rows.append(replace(row, options=options, parameters=2 * row.parameters))
    return replace(plan, rows=tuple(rows)), found


def alike(tensors: Mapping[str, Tensor], name: str, start: str) -> bool:
    return name in tensors and start in tensors and tensors[name].shape == tensors[start].shape
