"""Adapters in PEFT's folder format, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``.

A site's tensors are ``base_model.model.<path>.<PEFT's name>``; they are the same over a dense and an NF4 base. Which
methods there are, and what PEFT calls their fields and tensors, stands in ``peft_types``. PEFT itself is not needed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.adapters.bank import held
from lowrank.adapters.base import Adapter
from lowrank.adapters.expected import refuse_large, valueless
from lowrank.adapters.inject import apply, current_plan
from lowrank.adapters.plan import Factory, InjectionPlan, plan
from lowrank.adapters.sites import Pattern, sites
from lowrank.errors import ConfigError, RefusedError
from lowrank.export import peft_folder
from lowrank.export.peft_config import Config, checked, read_json
from lowrank.export.peft_folder import PREFIX
from lowrank.export.peft_format import Folder, Format, Site, Tensors
from lowrank.export.peft_lora import computes_factors
from lowrank.export.peft_types import FORMATS, LORA
from lowrank.quant.nf4 import NF4Linear

Model = TypeVar("Model", bound=nn.Module)


def export_peft(model: nn.Module, folder: str | Path, base_name: str | None = None, name: str | None = None) -> Path:
    """Writes the adapter of ``model`` as a folder that ``peft.PeftModel.from_pretrained(base, folder)`` reads.

    A method that PEFT has is written as that; where it has no place for it (an AdaLoRA in which sites differ), or has
    no such method, as a LoRA of ``adapter.factors()``, if it has these; so are several methods in one model. The folder
    is for the base as it was, also where the adapter's start changed it. ``base_name`` is what PEFT calls the base
    (else the model's own name or path); ``name`` says which of several adapters on the model is meant. Files of other
    names in ``folder`` are left alone.

    Raises ConfigError, with nothing written, where the model carries no adapter or one that PEFT cannot hold.
    """
    carried = exportable(model, name)
    format = chosen(carried)
    written = {site.path: format.tensors(site.adapter, site.base) for site in carried}
    tensors = {f"{PREFIX}{path}.{part}": tensor for path, found in written.items() for part, tensor in found.items()}
    config = common(model, base_name) | {"peft_type": format.peft_type} | format.fields(carried, written)
    if "target_modules" in format.reads:
        config["target_modules"] = target_modules(model, [site.path for site in carried])
    folder = Path(folder)
    peft_folder.write(folder, tensors | format.tensors_apart(carried[0].adapter), config)
    return folder


def exportable(model: nn.Module, name: str | None) -> list[Site]:
    carried = held(model, name)
    for row in current_plan(model, name).rows:
        if row.path not in carried:
            raise ConfigError(
                f"export: {row.path} carries {row.method}, which trains the base itself, and PEFT's folder holds "
                f"adapters alone. `lowrank merge` writes the whole model instead."
            )
    if not carried:
        raise ConfigError("export: the model carries no adapter.")
    layers = own_layers(model) if any(isinstance(one.site.base, NF4Linear) for one in carried.values()) else {}
    return [
        Site(
            path=path,
            adapter=one.adapter,
            options=one.options,
            base=one.site.base,
            moved=one.site.original is not one.site.base,
            layer=layers.get(path, one.site.base),
        )
        for path, one in carried.items()
    ]


def own_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the architecture has before anything is quantised; none where there is no way to know."""
    if not isinstance(model, PreTrainedModel):
        return {}
    with torch.device("meta"):
        return dict(type(model)(copy.deepcopy(model.config)).named_modules())


def chosen(carried: Sequence[Site]) -> Format:
    """PEFT's own type of the method, or LoRA's where every site is one."""
    methods = {type(site.adapter) for site in carried}
    own = next((format for format in FORMATS if methods <= {*format.methods}), None)
    why = "" if own is None else own.why_not(carried)
    if own is not None and why is None:
        return own
    other = LORA.why_not(carried)
    if other is None:
        return LORA
    names = sorted(method.__name__ for method in methods)
    if own is None and len(names) == 1 and carried[0].adapter.factors() is None:
        why = f"{carried[0].path} carries {names[0]}, which PEFT does not have"
    mixed = f" PEFT has one method for a whole model ({', '.join(names)} are here)." if len(names) > 1 else ""
    hint = " `lowrank merge` writes the whole model instead." if all(map(mergeable, carried)) else ""
    raise ConfigError(f"export: {why or other}.{mixed}{hint}")


def mergeable(site: Site) -> bool:
    own = type(site.adapter).merged is not Adapter.merged
    return own or (site.adapter.factors() is not None and computes_factors(site))


def common(model: nn.Module, base_name: str | None) -> dict[str, Any]:
    return {
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": base_name or getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
    }


def target_modules(model: nn.Module, paths: list[str]) -> list[str] | str:
    """The paths; as one regular expression where PEFT, which takes a listed path for the end of longer ones too,
    would find another module by one of them."""
    endings = tuple(f".{path}" for path in paths)
    if any(other.endswith(endings) for other, _ in sites(model) if other not in paths):
        return "|".join(re.escape(path) for path in paths)
    return paths


def import_peft(model: Model, folder: str | Path, name: str | None = None) -> Model:
    """Puts the adapter of a PEFT folder on a bare ``model``, in place; returns it. With a ``name`` it stands beside
    others that have one, as with ``load_adapter``.

    Sites, ranks and shapes come from the tensors themselves, of which none is read before all of them fit. Raises
    RefusedError where a file is missing, damaged, a pickle, leads out of the folder, or asks for what is not supported;
    ConfigError where the adapter does not fit this model. The model is then unchanged.
    """
    folder = Path(folder)
    format, config = read_config(folder)
    found = peft_folder.read(folder, model, format, config)
    bases = dict(sites(model))
    planned = plan_of(model, found, format, bases)
    adapters = valueless(model, planned)
    peft_folder.refuse_misfits(found, format, adapters, bases)
    refuse_large(model, adapters)
    found = peft_folder.with_values(folder, model, format, config)
    apply(model, planned, name=name)
    for path, one in held(model, name).items():
        fill(one.adapter, format.state(found, path, one.adapter))
    return model


def read_config(folder: Path) -> tuple[Format, Config]:
    file, given = read_json(folder)
    types = {format.peft_type: format for format in FORMATS}
    wanted = given.get("peft_type")
    format = types.get(wanted) if isinstance(wanted, str) else None
    if format is None:
        shown = Config(file, {"peft_type": wanted})
        raise shown.refusal("peft_type", f"one of {', '.join(types)}")
    return format, checked(file, given, format.reads, format.neutral)


def plan_of(model: nn.Module, found: Folder, format: Format, bases: dict[str, nn.Module]) -> InjectionPlan:
    """A rule for all sites with the same options."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for path in found.sites:
        options = format.options(found, path, bases[path])
        groups.setdefault(repr(options), (options, []))[1].append(path)
    rules: dict[Pattern, Factory] = {
        f"re:{'|'.join(map(re.escape, paths))}": partial(format.method(found.config), **options)
        for options, paths in groups.values()
    }
    try:
        return plan(model, rules)
    except ConfigError as error:
        if isinstance(error.__cause__, ValueError):  # an option out of its range
            raise RefusedError(f"{found.config.file}: {error.__cause__}") from error
        raise


@torch.no_grad()
def fill(adapter: Adapter, state: Tensors) -> None:
    """fp64 values stay fp64; everything narrower becomes fp32, exactly."""
    dtype = torch.float32
    for tensor in state.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    adapter.to(dtype)
    for name, tensor in state.items():
        getattr(adapter, name).copy_(tensor)
