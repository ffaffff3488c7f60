"""A merged model as a plain transformers folder: weights, configuration, generation settings and tokenizer.

A model with NF4 layers is written as bitsandbytes' own 4-bit tensors, which transformers loads where bitsandbytes and
accelerate are installed.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.base import NotMergeable, dense_weight
from lowrank.adapters.effect import Tokens
from lowrank.adapters.merge import MergeReport, merge
from lowrank.disk import sync
from lowrank.errors import ConfigError
from lowrank.models.quiet import quiet
from lowrank.quant.nf4 import BLOCK, NF4Linear


def save_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    to: str = "dense",
    method: str = "best",
    min_share: float | None = 0.5,
    probe: Tokens | None = None,
    calibration: Tokens | None = None,
    notes: Sequence[str] = (),
) -> MergeReport:
    """Merges ``model`` and writes what ``AutoModelForCausalLM.from_pretrained(folder)`` loads; ``model`` stays as is.

    The arguments are those of ``lowrank.merge``; ``notes`` go into the report. ``dense``: an NF4 base is written in
    the model's dtype. ``nf4``: the weights of NF4 layers in bitsandbytes' format, which names it in ``config.json``.
    bitsandbytes' own kernel for CPUs with AVX-512 BF16 then computes in bf16, whatever the model's dtype.

    The folder appears whole or not at all. With nothing written it raises ConfigError where the folder is there
    already and not empty, where a method cannot be merged, or where bitsandbytes would read an NF4 layer wrongly;
    RefusedError where too little of the adapter survives.
    """
    folder = Path(folder)
    refuse_occupied(folder)
    try:
        merged, report = merge(model, to, method, min_share, probe, calibration)
    except NotMergeable as error:
        raise ConfigError(f"merge: {error}.") from error
    tensors = None
    if to == "nf4":
        merged.config.quantization_config = quantisation(merged)
        tensors = four_bit(merged)
    elif any(isinstance(module, NF4Linear) for module in model.modules()):
        restore_layers(merged)
    with whole(folder) as staging, quiet():
        merged.save_pretrained(staging, state_dict=tensors)
        tokenizer.save_pretrained(staging)
    return replace(report, notes=(*report.notes, *notes))


def quantisation(model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``: transformers makes a 4-bit layer of each Linear or Conv1D but
    those that it is told to skip."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D, NF4Linear))}
    quantised = [layer for layer in layers.values() if isinstance(layer, NF4Linear)]
    compute = {str(compute_dtype(model, layer)).removeprefix("torch.") for layer in quantised}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(layer.double_quantized for layer in quantised),
        "bnb_4bit_compute_dtype": min(compute, default="float32"),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [path for path, layer in layers.items() if not isinstance(layer, NF4Linear)],
    }


def compute_dtype(model: nn.Module, layer: NF4Linear) -> torch.dtype:
    """What the layer computes in, of the types that bitsandbytes knows."""
    dtype = layer.compute_dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def four_bit(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, an NF4 layer's as bitsandbytes' ``Linear4bit`` saves them: ``weight``, bytes (n, 1),
    and its statistics as ``weight.absmax`` and the like. A Conv1D's is (out, in) there too."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        if not isinstance(layer, NF4Linear) or leaf == "bias":
            tensors[name] = tensor
        elif leaf == "packed":
            refuse_width(path, layer)
            state = layer.quant_state(compute_dtype(model, layer))
            state.shape = torch.Size((layer.out_features, layer.in_features))
            tensors[f"{path}.weight"] = layer.packed.detach().view(-1, 1)
            parts = state.as_dict(packed=True)
            tensors |= {f"{path}.weight.{what}": part.detach().clone() for what, part in parts.items()}
    return tensors


def refuse_width(path: str, layer: NF4Linear) -> None:
    if layer.in_features % BLOCK:
        raise ConfigError(
            f"merge: {path} is {layer.in_features} wide, no multiple of {BLOCK}: bitsandbytes' CPU kernel would read "
            f"its 4-bit weights under wrong scales. Use to=dense."
        )


def refuse_occupied(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: not empty. Name a folder that is empty or not there yet.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder.")


def restore_layers(model: PreTrainedModel) -> None:
    """Puts the architecture's own dense layer (Linear or Conv1D) wherever quantising has put another, in place."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    own = {path: layer for path, layer in plain.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}
    for path, layer in own.items():
        held = model.get_submodule(path)
        if isinstance(held, NF4Linear) or type(held) is not type(layer):
            weight = dense_weight(held).to(dtype)  # (out, in)
            layer.weight = frozen(weight.T if isinstance(layer, Conv1D) else weight)
            layer.bias = None if held.bias is None else frozen(held.bias.to(dtype))
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to fill beside ``folder``; on success it is synced and takes that name, on failure it goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".staging-{folder.name}-{os.getpid()}"
    staging.mkdir()
    try:
        yield staging
        for path in (*staging.rglob("*"), staging):
            sync(path)
        staging.rename(folder)  # also over an empty folder
        sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
