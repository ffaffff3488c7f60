"""What an adapter's file should hold by its plan, and what it says that it holds, before memory is taken for either."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowrank.adapters.base import Adapter
from lowrank.adapters.inject import (
    method,
    names_parameter,
    refuse_misfits,
    refuse_other_model,
    shared_options,
    state_of,
)
from lowrank.adapters.plan import InjectionPlan, is_ours, resolve, stand_in
from lowrank.adapters.sites import count, sites
from lowrank.errors import RefusedError

TIMES, SMALL = 4, 2**24  # what an adapter may have: so many times its model's parameters, or about that many
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


def header(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file by name, without values: none is read. Raises RefusedError naming the file."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
            described = {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise RefusedError(f"{file}: cannot be read: {error}.") from error
    for name, (_, dtype) in described.items():
        if dtype not in DTYPES:
            raise RefusedError(f"{file}: {name[:200]} holds {dtype}, which is not read here.")
    return {name: torch.empty(size, dtype=DTYPES[dtype], device="meta") for name, (size, dtype) in described.items()}


def refuse_other(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises RefusedError where a header does not describe the ``wanted`` tensors and nothing more."""
    refuse_misfits(*({name: tuple(t.shape) for name, t in held.items()} for held in (wanted, found)))
    for name, tensor in found.items():
        if wanted[name].is_floating_point() != tensor.is_floating_point():
            kinds = [str(one.dtype).removeprefix("torch.") for one in (tensor, wanted[name])]
            raise RefusedError(f"{name} holds {kinds[0]}, not {kinds[1]}.")


def expected(model: nn.Module, plan: InjectionPlan) -> dict[str, Tensor]:
    """What ``adapter_state`` will be once the plan is carried out, without values for the adapters' own.

    Raises ConfigError where the plan is not this model's, RefusedError where no adapter can be made of its options, or
    none that memory should be taken for.
    """
    try:
        adapters = valueless(model, plan)
        refuse_large(model, adapters)
        return state_of(model, plan, adapters)
    except ValueError as error:  # an option out of range
        raise RefusedError(str(error)) from error
    except (TypeError, RuntimeError, ArithmeticError) as error:
        if not all(is_ours(row.adapter) for row in plan.rows):
            raise  # the user's own class: its bug, with its traceback
        raise RefusedError(f"no adapter can be made of its options ({str(error).splitlines()[0][:200]}).") from error


def valueless(model: nn.Module, plan: InjectionPlan) -> dict[str, Adapter]:
    """The plan's adapters by path on the meta device: a plan may ask for any size.

    Raises ConfigError where the plan is not this model's, and what a constructor raises.
    """
    refuse_other_model(model, plan)
    bare = dict(sites(model))
    wrapped = [row for row in plan.rows if not names_parameter(row)]
    with torch.device("meta"):
        shared = shared_options(wrapped, 0)
        return {
            row.path: resolve(row.adapter)(
                stand_in(bare[row.path]), generator=torch.Generator("cpu"), **row.options, **shared[method(row)]
            )
            for row in wrapped
        }


def refuse_large(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Raises RefusedError where adapters without values would be several times as large as their model with them."""
    held = {id(t): t.numel() for one in adapters.values() for t in (*one.parameters(), *one.buffers())}
    size, most = sum(held.values()), TIMES * count(model) + SMALL
    if size > most:
        raise RefusedError(f"{size:,} values of adapters for a model of {count(model):,} parameters are not made.")
