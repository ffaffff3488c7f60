"""A model of a run's own shape with a few of its blocks: what one block costs, and what all the rest costs, can be
measured on it in seconds. Its weights are random; layers, precision, quantisation, adapters and paths are the run's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lowrank import assemble
from lowrank.adapters.inject import apply
from lowrank.adapters.plan import InjectionPlan, Row
from lowrank.adapters.sites import blocks, sites
from lowrank.assemble import Loaded, Parts
from lowrank.keys import Clock
from lowrank.models import load as models
from lowrank.quant.convert import quantizable, quantize
from lowrank.quant.nf4 import NF4Linear

KINDS = 3  # of blocks that are told apart; with more, only what lies below the lowest trained one


def kinds(plan: InjectionPlan, skeleton: nn.Module) -> list[list[int]]:
    """The numbers of a model's blocks, those together that cost the same: of one shape, with the same adapters, and on
    the same side of the lowest block that trains, below which no gradient goes."""
    paths = blocks(skeleton)
    lowest = lowest_trained(plan, skeleton)
    exact: dict[Any, list[int]] = {}
    coarse: dict[bool, list[int]] = {}
    for number, path in enumerate(paths):
        coarse.setdefault(number < lowest, []).append(number)
        exact.setdefault((number < lowest, look(plan, skeleton, path, number)), []).append(number)
    return list((exact if len(exact) <= KINDS else coarse).values())


def look(plan: InjectionPlan, skeleton: nn.Module, path: str, number: int) -> Any:
    """What tells a block's cost: its modules with their shapes, what the plan puts on them, its own settings."""
    block = skeleton.get_submodule(path)
    made = tuple(
        (name, type(module).__name__, *(tuple(p.shape) for p in module.parameters(recurse=False)))
        for name, module in block.named_modules()
    )
    rows = tuple((row.path.removeprefix(path), row.call) for row in plan.rows if inside(row.path, path))
    settings = tuple((name, str(values[number])) for name, values in per_layer(text_config(skeleton)).items())
    return made, rows, settings


def lowest_trained(plan: InjectionPlan, skeleton: nn.Module) -> int:
    """The number of the lowest block that a gradient reaches; as many as there are blocks where none is. What stands
    behind the last block in the model (final norm, head) is computed after it."""
    paths = blocks(skeleton)
    order = [path for path, _ in sites(skeleton)]
    behind = {path for path in order[order.index(paths[-1]) :] if not inside(path, paths[-1])} if paths else set()
    numbers = []
    for row in plan.rows:
        own = next((number for number, path in enumerate(paths) if inside(row.path, path)), None)
        if own is not None or not any(inside(row.path, path) for path in behind):
            numbers.append(own or 0)
    return min(numbers, default=len(paths))


def inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def thin(parts: Parts, skeleton: nn.Module, kept: Sequence[int], clock: Clock) -> Loaded:
    """The run's model of the blocks ``kept`` alone, with its adapters on, as fast as the run's will be."""
    model = drawn(parts, skeleton, kept)
    loaded = assemble.ready(parts, model)
    apply(loaded.model, renamed(parts.plan, blocks(skeleton), blocks(model), kept), 0, clock, keep_base=False)
    assemble.quickened(parts, loaded.model)
    return loaded


def drawn(parts: Parts, skeleton: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Random weights, NF4 where the run's are."""
    config = copy.deepcopy(models.config(parts.config.model))
    text = config.get_text_config()
    for name, values in per_layer(text).items():
        setattr(text, name, [values[number] for number in kept])
    text.num_hidden_layers = len(kept)
    devices = [parts.device] if parts.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), parts.device:
        model = AutoModelForCausalLM.from_config(config, dtype=parts.dtype, trust_remote_code=False).eval()
    if parts.config.quant.kind == "none":
        return model
    known = dict(sites(skeleton))
    back = dict(zip(blocks(model), (blocks(skeleton)[number] for number in kept), strict=True))
    dense = [path for path in quantizable(model, ()) if not isinstance(known[moved(path, back)], NF4Linear)]
    return quantize(model, **{**assemble.quant_options(parts.config), "skip": dense})


def text_config(model: Any) -> Any:
    return model.config.get_text_config()


def per_layer(config: Any) -> dict[str, Sequence[Any]]:
    """The settings that a configuration holds one of for each block (``layer_types``)."""
    deep = config.num_hidden_layers
    lists = {name: value for name, value in vars(config).items() if isinstance(value, (list, tuple))}
    return {name: value for name, value in lists.items() if "layer" in name and len(value) == deep}


def renamed(plan: InjectionPlan, old: Sequence[str], new: Sequence[str], kept: Sequence[int]) -> InjectionPlan:
    """The rows of the blocks ``kept`` under the numbers that these have now, and all rows outside of blocks."""
    names = {old[number]: path for number, path in zip(kept, new, strict=True)}
    left_out = [path for path in old if path not in names]

    def row(one: Row) -> Row:
        return replace(one, path=moved(one.path, names), group=moved(one.group, names))

    rows = tuple(row(one) for one in plan.rows if not any(inside(one.path, path) for path in left_out))
    return replace(plan, rows=rows)


def moved(path: str, names: dict[str, str]) -> str:
    """A path, or a group that begins with one, whose block is called otherwise now."""
    for old, new in names.items():
        if path == old or path.startswith((f"{old}.", f"{old}:")):
            return new + path.removeprefix(old)
    return path
