"""What a configuration resolves to on this machine, known without a weight."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lowrank import classes, schema
from lowrank.adapters.base import Adapter
from lowrank.adapters.expected import valueless
from lowrank.adapters.inject import apply, named_trainable, names_parameter
from lowrank.adapters.plan import Factory, InjectionPlan, Rules, class_and_options, plan
from lowrank.errors import ConfigError, OutOfMemory
from lowrank.models import load as models
from lowrank.quant.convert import quantize
from lowrank.schema import Config
from lowrank.track import tracker_class
from lowrank.train import in_backward, optim
from lowrank.train import precision as precisions


@dataclass(frozen=True)
class Parts:
    """What a configuration resolves to on this machine, known without a weight."""

    config: Config
    device: torch.device
    precision: str
    dtype: torch.dtype  # of the base's dense weights
    plan: InjectionPlan
    tokenizer: PreTrainedTokenizerBase

    def __str__(self) -> str:
        config, plan = self.config, self.plan
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{config.model.name or config.model.kind} ({dtype}, quant {config.quant.kind}) on {self.device}, "
            f"precision {self.precision}, {torch.get_num_threads()} threads; {len(plan.rows)} sites, "
            f"{plan.trainable_parameters:,} of {plan.total_parameters:,} parameters train"
        )


def parts(config: Config, read: Callable[[Any], PreTrainedTokenizerBase] = models.tokenizer) -> Parts:
    """Raises ConfigError for a model that is not there, targets that match nothing, a device that is missing.

    ``read`` gives the tokenizer of the configuration's ``model`` group.
    """
    device = resolve_device(config.loop.device)
    if config.loop.offload and device.type != "cuda":
        raise ConfigError(f"loop.offload: true is not allowed on {device.type}; false, or loop.device=cuda.")
    if config.loop.compile != "off" and device.type != "cuda":
        raise ConfigError(f"loop.compile: block is not allowed on {device.type}; off, or loop.device=cuda.")
    precision = precisions.resolve(config.loop.precision, device)
    if config.track.kind != "none":
        tracker_class(config.track)
    bare, tokenizer = skeleton(config), read(config.model)
    factories = {pattern: tokenised(made, tokenizer) for pattern, made in rules(config.adapter).items()}
    planned = plan(bare, factories, config.adapter.exclude)
    refuse_too_large(bare, planned, device)
    # The optimizer's rules go by the names that will train: tried on the skeleton, before a weight is read.
    names = named_trainable(apply(bare, planned))
    optim.groups(names, config.optim.groups, lr=config.optim.lr, weight_decay=config.optim.weight_decay)
    check_optimizer(config, device)
    dtype = resolve_dtype(config, precision, planned)
    return Parts(config, device, precision, dtype, planned, tokenizer)


def check_optimizer(config: Config, device: torch.device) -> None:
    """Raises ConfigError for an optimizer that this device, or a step within backward, cannot have."""
    cls = classes.resolve(config.optim.target, torch.optim.Optimizer, "optim._target_")
    optim.refuse_paged(cls, device)
    if config.optim.in_backward:
        in_backward.refuse(cls)


def refuse_too_large(model: nn.Module, planned: InjectionPlan, device: torch.device) -> None:
    """Raises OutOfMemory, before memory is taken, where the adapters' values and gradients alone would not fit."""
    held = {id(t): t.numel() for one in valueless(model, planned).values() for t in (*one.parameters(), *one.buffers())}
    needed = 4 * (sum(held.values()) + planned.trainable_parameters)  # bytes, in fp32
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else pages
    if needed > there:
        raise OutOfMemory(
            f"adapter: {planned.trainable_parameters:,} trainable parameters need, with their gradients, at least "
            f"{needed / 2**30:,.1f} GiB of the {there / 2**30:,.1f} there are. Lower the adapter's size (adapter.r) or "
            f"adapt fewer sites (adapter.targets)."
        )


def skeleton(config: Config) -> nn.Module:
    """The model on the meta device, its linear weights NF4 where they will be."""
    bare = models.skeleton(config.model)
    return quantize(bare, **quant_options(config)) if config.quant.kind == "nf4" else bare


def quant_options(config: Config) -> dict[str, Any]:
    quant = config.quant
    compute = precisions.DTYPES[quant.compute_dtype] if quant.compute_dtype else None
    return {"double": quant.double, "skip": quant.skip, "compute_dtype": compute}


def rules(adapter: schema.Adapter) -> Rules:
    """``adapter.targets`` as the injector's rules: pattern → the class with its options, or another class with its."""
    cls = classes.resolve(adapter.target, Adapter, "adapter._target_")
    targets, options = adapter.targets, adapter.options
    if isinstance(targets, dict):
        return {pattern: rule(pattern, cls, options, changed) for pattern, changed in targets.items()}
    patterns = [targets] if isinstance(targets, str) else targets
    twice = [pattern for pattern in patterns if patterns.count(pattern) > 1]
    if twice:
        raise ConfigError(f"adapter.targets: '{twice[0]}' is listed twice.")
    return {pattern: partial(cls, **options) for pattern in patterns}


def rule(pattern: str, cls: type, options: dict[str, Any], changed: dict[str, Any]) -> Factory:
    """A pattern's own ``_target_`` stands alone; without one it is the group's class with some options changed."""
    if "_target_" not in changed:
        return partial(cls, **{**options, **changed})
    own = {name: value for name, value in changed.items() if name != "_target_"}
    return partial(classes.resolve(changed["_target_"], Adapter, f"adapter.targets['{pattern}']._target_"), **own)


def tokenised(factory: Factory, tokenizer: PreTrainedTokenizerBase) -> Factory:
    """A rule's factory with the token ids of the options that are text."""
    cls, options = class_and_options(factory)
    texts = {name: options[name] for name in cls.texts if isinstance(options.get(name), str)}
    ids = {name: tokenizer(text, add_special_tokens=False).input_ids for name, text in texts.items()}
    return partial(cls, **{**options, **ids})


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device, there = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ConfigError(f"loop.device: '{name}' is not here; this machine has {there} CUDA devices.")
    return device


def resolve_dtype(config: Config, precision: str, planned: InjectionPlan) -> torch.dtype:
    """``auto``: bf16 for a frozen base under bf16, else fp32 (a base that trains needs its small updates)."""
    if config.model.dtype != "auto":
        return precisions.DTYPES[config.model.dtype]
    frozen = not any(names_parameter(row) for row in planned.rows)
    return torch.bfloat16 if frozen and precision == "bf16" else torch.float32
