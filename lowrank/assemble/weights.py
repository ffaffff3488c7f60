"""The base's weights, read, quantised and tried for whether this model's documents can be packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowrank.assemble.resolved import Parts, quant_options
from lowrank.data.pack import Batch, Document, pack, pad
from lowrank.fast import heap, linear
from lowrank.models import attention
from lowrank.models import load as models
from lowrank.quant.convert import load_quantized, quantize, report
from lowrank.schema import Config


@dataclass(frozen=True)
class Loaded:
    """The base, ready for its adapters, and how its documents are put into batches."""

    model: Any  # a transformers causal LM
    collate: Callable[[Sequence[Document]], Batch]
    fast: str  # what products run on: part of a run's identity
    notes: tuple[str, ...]
    hashes: dict[str, str] | None = None  # of the base's tensors, where they have been taken already

    @property
    def packed(self) -> bool:
        """Whether documents stand end to end, not padded one a row."""
        return self.collate is pack


def load(parts: Parts) -> Loaded:
    if parts.device.type == "cpu":
        heap.bound()
    return ready(parts, base(parts.config, parts.dtype))


def held(parts: Parts) -> int:
    """Bytes of this process that are the run's base, before it is loaded: none, unless somebody keeps bases."""
    return 0


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
