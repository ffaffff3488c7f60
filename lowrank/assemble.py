"""From a configuration to the parts of a run, in an order in which what is wrong shows before it costs time.

``parts`` reads no weight: the plan is made on the meta device. ``data`` reads and tokenises the examples. ``load``
reads the weights, quantises, and finds out whether this model's documents can be packed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lowrank import classes, fast, schema
from lowrank.adapters.base import Adapter
from lowrank.adapters.expected import valueless
from lowrank.adapters.inject import apply, hooks, named_trainable, names_parameter
from lowrank.adapters.plan import Factory, InjectionPlan, Rules, class_and_options, plan
from lowrank.adapters.sites import adapted
from lowrank.data import chat, sources
from lowrank.data.order import Batches
from lowrank.data.pack import Batch, Document, pack, pad
from lowrank.errors import ConfigError, OutOfMemory
from lowrank.eval.generate import room, taken
from lowrank.evaluate import Evaluator
from lowrank.fast import heap, linear
from lowrank.fast.compile import compile_blocks
from lowrank.fast.loss import chunked
from lowrank.fast.offload import Offload
from lowrank.fast.recompute import recompute
from lowrank.models import attention
from lowrank.models import load as models
from lowrank.models.cache import cache
from lowrank.quant.convert import load_quantized, quantize, report
from lowrank.schema import Config
from lowrank.track import writer_class
from lowrank.train import in_backward, optim
from lowrank.train import precision as precisions
from lowrank.train.loss import target_loss
from lowrank.train.schedule import Schedule, schedule


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


def parts(config: Config) -> Parts:
    """Raises ConfigError for a model that is not there, targets that match nothing, a device that is missing."""
    device = resolve_device(config.loop.device)
    if config.loop.offload and device.type != "cuda":
        raise ConfigError(f"loop.offload: true is not allowed on {device.type}; false, or loop.device=cuda.")
    if config.loop.compile != "off" and device.type != "cuda":
        raise ConfigError(f"loop.compile: block is not allowed on {device.type}; off, or loop.device=cuda.")
    precision = precisions.resolve(config.loop.precision, device)
    if config.track.kind != "none":
        writer_class(config.track.kind)
    bare, tokenizer = skeleton(config), models.tokenizer(config.model)
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


@dataclass(frozen=True)
class Data:
    """The examples of a run, tokenised."""

    split: sources.Split
    train: list[chat.Example]
    eval: list[chat.Example]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        first = f"data: {self.split.name}, {len(self.train):,} examples to train on, {len(self.eval):,} held out"
        return "\n".join([first, *self.notes])


def data(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Raises DataError for what a file, a column or a row has wrong."""
    split = sources.load(config.data, cache())
    kept: dict[str, list[chat.Example]] = {}
    notes = [*split.notes]
    for what, records in (("train", split.train), ("eval", split.eval)):
        kept[what], dropped = chat.examples(
            records,
            tokenizer,
            template=config.data.template,
            train_on=config.data.train_on,
            max_length=config.data.max_length,
            on_empty=config.data.on_empty,
            what=what,
        )
        if dropped:
            notes.append(f"data: {dropped:,} {what} examples without a target token dropped")
    return Data(split, kept["train"], kept["eval"], tuple(notes))


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


@dataclass(frozen=True)
class Loaded:
    """The base, ready for its adapters, and how its documents are put into batches."""

    model: Any  # a transformers causal LM
    collate: Callable[[Sequence[Document]], Batch]
    fast: str  # what products run on: part of a run's identity
    notes: tuple[str, ...]

    @property
    def packed(self) -> bool:
        """Whether documents stand end to end, not padded one a row."""
        return self.collate is pack


def load(parts: Parts) -> Loaded:
    if parts.device.type == "cpu":
        heap.bound()
    return ready(parts, base(parts.config, parts.dtype))


def ready(parts: Parts, model: Any) -> Loaded:
    """A base whose weights are there, frozen on its device and set up as the configuration says."""
    config = parts.config
    model = model.to(parts.device).requires_grad_(False)
    notes = [str(report(model))] if config.quant.kind == "nf4" else []
    fast = linear.fuse(model) if config.loop.fast else "off"
    plain = model.config._attn_implementation
    why_not = attention.install(model) or attention.cannot_pack(model)
    if why_not:
        notes.append(f"documents are padded, not packed: {why_not}")
        model.set_attn_implementation(plain)
    return Loaded(model, pad if why_not else pack, fast, tuple(notes))


def quickened(parts: Parts, model: nn.Module) -> str:
    """Puts a model that has its adapters on the fast path, and recomputes, as the configuration says; the line that
    tells of both."""
    loop = parts.config.loop
    path = fast.fuse(model) if loop.fast else "fast path: off (loop.fast=false)"
    again = recompute(model, loop.gradient_checkpointing, Offload(parts.device) if loop.offload else None)
    compiled = compile_blocks(model) if loop.compile == "block" else ""
    return "; ".join(part for part in (path, again, compiled) if part)


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


def check_length(parts: Parts, data: Data) -> None:
    """Raises ConfigError, before a weight is read, where a method's course over time does not fit the run's steps, or
    the longest text not the positions that a method's own rows leave."""
    steps, _ = steps_and_schedule(parts.config, batches(parts.config, data, pack))
    model = apply(skeleton(parts.config), parts.plan)
    over_time = hooks(model, steps)
    if parts.config.optim.in_backward:
        refuse_all_gradients(model, over_time)
    left, longest = room(model), max(len(example.tokens) for example in (*data.train, *data.eval))
    if taken(model) and left is not None and longest > left:
        raise ConfigError(
            f"data.max_length: a text of {longest:,} tokens exceeds the {left:,} of the model's positions that "
            f"adapter.length leaves. Lower one of the two."
        )


def refuse_all_gradients(model: nn.Module, over_time: Sequence[Any]) -> None:
    """Raises ConfigError, for ``optim.in_backward``, where a method wants all gradients before the first is used."""
    penalised = (type(one.adapter) for _, one in adapted(model) if type(one.adapter).penalty is not Adapter.penalty)
    who = next((cls.__name__ for cls in (*penalised, *map(type, over_time))), None)
    if who is not None:
        raise ConfigError(f"optim.in_backward: true is not allowed; false, because {who} needs all gradients together.")


def batches(config: Config, data: Data, collate: Callable[[Sequence[Document]], Batch]) -> Batches:
    loop = config.loop
    return Batches(
        data.train,
        collate,
        seed=loop.seed,
        micro_batch=loop.micro_batch,
        micro_batch_tokens=loop.micro_batch_tokens,
        packing=loop.packing,
        accumulate=loop.accumulate,
    )


def loss(config: Config) -> Callable[[nn.Module, Any], Tensor]:
    """Summed over a batch's target tokens."""
    return chunked(target_loss) if config.loop.fast else target_loss


def evaluator(config: Config, parts: Parts, data: Data, loaded: Loaded) -> Evaluator:
    """``config`` may differ from the parts' own in what is evaluated."""
    return Evaluator(
        parts.tokenizer,
        data.eval,
        config.eval,
        collate=loaded.collate,
        loss=loss(config),
        autocast=precisions.Precision(parts.precision, parts.device).autocast,
        stop=chat.ending(parts.tokenizer, config.data.template)[-1:],
        seed=config.data.seed,
    )


def steps_and_schedule(config: Config, order: Batches) -> tuple[int, Schedule]:
    """Optimizer steps of the whole run, and the learning rate's factor at each."""
    total = config.loop.steps or order.steps(config.loop.epochs or 1)
    wanted = config.schedule
    try:
        return total, schedule(wanted.kind, warmup=wanted.warmup, total=total, options=wanted.options)
    except ValueError as error:
        raise ConfigError(str(error)) from error
