"""From a configuration to everything a run needs, in an order in which what is wrong shows before it costs time.

``prepare`` reads no weight: the plan is made on the meta device and the data are tokenised. ``load`` reads the
weights, quantises, and finds out whether this model's documents can be packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lowrank import classes
from lowrank.adapters.base import Adapter
from lowrank.adapters.plan import InjectionPlan, Rules, plan
from lowrank.config import Config
from lowrank.data import chat, sources
from lowrank.data.order import Batches
from lowrank.data.pack import Batch, pack, pad
from lowrank.errors import ConfigError
from lowrank.models import attention
from lowrank.models import load as models
from lowrank.quant.convert import load_quantized, quantize, report
from lowrank.train import precision as precisions
from lowrank.train.schedule import Schedule, schedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Prepared:
    """All that can be known without a weight."""

    config: Config
    device: torch.device
    precision: str
    dtype: torch.dtype  # of the base's dense weights
    plan: InjectionPlan
    tokenizer: PreTrainedTokenizerBase
    split: sources.Split
    train: list[chat.Example]
    eval: list[chat.Example]
    notes: tuple[str, ...]  # what the user should know


def prepare(config: Config) -> Prepared:
    """Raises ConfigError or DataError for everything that a configuration, a plan or the data can have wrong."""
    device = resolve_device(config.loop.device)
    precision = precisions.resolve(config.loop.precision, device)
    planned = plan(skeleton(config), rules(config))
    tokenizer = models.tokenizer(config.model)
    split = sources.load(config.data)
    kept, notes = [], []
    for what, records in (("train", split.train), ("eval", split.eval)):
        examples, dropped = chat.examples(
            records,
            tokenizer,
            template=config.data.template,
            train_on=config.data.train_on,
            max_length=config.data.max_length,
            on_empty=config.data.on_empty,
            what=what,
        )
        kept.append(examples)
        if dropped:
            notes.append(f"data: {dropped:,} {what} examples without a target token dropped")
    dtype = resolve_dtype(config, precision, planned)
    return Prepared(
        config, device, precision, dtype, planned, tokenizer, split, kept[0], kept[1], (*planned.notes, *notes)
    )


def skeleton(config: Config) -> nn.Module:
    """The model on the meta device, its linear weights NF4 where they will be."""
    bare = models.skeleton(config.model)
    return quantize(bare, **quant_options(config)) if config.quant.kind == "nf4" else bare


def quant_options(config: Config) -> dict[str, Any]:
    quant = config.quant
    compute = DTYPES[quant.compute_dtype] if quant.compute_dtype else None
    return {"double": quant.double, "skip": quant.skip, "compute_dtype": compute}


def rules(config: Config) -> Rules:
    """``adapter.targets`` as the injector's rules: pattern → the class with its options."""
    cls = classes.resolve(config.adapter.target, Adapter, "adapter._target_")
    targets, options = config.adapter.targets, config.adapter.options
    if isinstance(targets, dict):
        return {pattern: partial(cls, **{**options, **changed}) for pattern, changed in targets.items()}
    patterns = [targets] if isinstance(targets, str) else targets
    twice = [pattern for pattern in patterns if patterns.count(pattern) > 1]
    if twice:
        raise ConfigError(f"adapter.targets: '{twice[0]}' is listed twice.")
    return {pattern: partial(cls, **options) for pattern in patterns}


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"loop.device: '{name}' is not here; this machine has {torch.cuda.device_count()} CUDA devices."
        )
    return device


def resolve_dtype(config: Config, precision: str, planned: InjectionPlan) -> torch.dtype:
    """``auto``: bf16 for a frozen base under bf16, else fp32 (a base that trains needs its small updates)."""
    if config.model.dtype != "auto":
        return DTYPES[config.model.dtype]
    frozen = all("parameter" not in _sites(row.adapter) for row in planned.rows)
    return torch.bfloat16 if frozen and precision == "bf16" else torch.float32


def _sites(adapter: str) -> tuple[str, ...]:
    return classes.resolve(adapter, Adapter, "adapter._target_").sites  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Loaded:
    """The base, ready for its adapters, and how its documents are put into batches."""

    model: nn.Module
    collate: Callable[[Sequence[chat.Example]], Batch]
    notes: tuple[str, ...]


def load(prepared: Prepared) -> Loaded:
    config = prepared.config
    model = base(config, prepared.dtype).to(prepared.device)
    notes = [str(report(model))] if config.quant.kind == "nf4" else []
    why_not = attention.install(model) or attention.cannot_pack(model)
    if why_not:
        notes.append(f"documents are padded, not packed: {why_not}")
        model.set_attn_implementation("eager" if not getattr(model, "_supports_sdpa", False) else "sdpa")
    if config.loop.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Loaded(model, pad if why_not else pack, tuple(notes))


def base(config: Config, dtype: torch.dtype) -> nn.Module:
    """The base's weights on the CPU, quantised while they are read where the configuration says so."""
    if config.quant.kind == "none":
        return models.weights(config.model, dtype)
    files = sorted(models.folder(config.model).glob("*.safetensors"))
    options = quant_options(config)
    if files:
        try:
            return load_quantized(models.skeleton(config.model, dtype), files, dtype=dtype, **options).eval()
        except KeyError:  # the architecture's names are not the file's: transformers translates them, densely
            pass
    return quantize(models.weights(config.model, dtype), **options)


def batches(prepared: Prepared, loaded: Loaded) -> Batches:
    loop = prepared.config.loop
    return Batches(
        prepared.train,
        loaded.collate,
        seed=loop.seed,
        micro_batch=loop.micro_batch,
        micro_batch_tokens=loop.micro_batch_tokens,
        accumulate=loop.accumulate,
    )


def steps_and_schedule(config: Config, order: Batches) -> tuple[int, Schedule]:
    """Optimizer steps of the whole run, and the learning rate's factor at each."""
    steps = config.loop.steps or order.steps(config.loop.epochs or 1)
    try:
        made = schedule(
            config.schedule.kind, warmup=config.schedule.warmup, total=steps, options=config.schedule.options
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return steps, made
