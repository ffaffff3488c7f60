"""A merged model as a plain transformers folder: weights, configuration, generation settings and tokenizer."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.base import NotMergeable, dense_weight
from lowrank.adapters.merge import MergeReport, merge
from lowrank.disk import sync
from lowrank.errors import ConfigError
from lowrank.models.quiet import quiet
from lowrank.quant.nf4 import NF4Linear


def save_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> MergeReport:
    """Merges ``model`` and writes what ``AutoModelForCausalLM.from_pretrained(folder)`` loads; ``model`` stays as is.

    An NF4 base is written dense, in the model's dtype. The folder appears whole or not at all. Raises ConfigError,
    with nothing written, where it is there already and not empty, or where a method cannot be merged.
    """
    folder = Path(folder)
    refuse_occupied(folder)
    try:
        merged, report = merge(model)
    except NotMergeable as error:
        raise ConfigError(f"merge: {error}.") from error
    if any(isinstance(module, NF4Linear) for module in model.modules()):
        restore_layers(merged)
    with whole(folder) as staging, quiet():
        merged.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return report


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
