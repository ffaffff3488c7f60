"""From a dense model to NF4: in place, or while its weights are being read, one layer at a time."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.errors import ConfigError, nearest
from lowrank.quant.nf4 import NF4Linear

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class QuantReport:
    """What quantising saved: bytes of the converted weights before (in fp32) and after, biases left out."""

    layers: int
    before: int
    after: int

    def __str__(self) -> str:
        if not self.layers:
            return "nf4: no linear weights to quantise"
        return (
            f"nf4: {self.layers} linear weights, {self.before / 2**20:,.1f} MiB in fp32 → "
            f"{self.after / 2**20:,.1f} MiB "
            f"({self.before / self.after:.2f}×, {32 * self.after / self.before:.2f} bits a weight)"
        )


def quantize(
    model: Model,
    kind: str = "nf4",
    *,
    double: bool = True,
    skip: Sequence[str] = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
) -> Model:
    """Replaces every linear-like weight of ``model`` but its head's by NF4, in place, a layer at a time.

    ``skip`` names further layers to leave dense: globs over paths, or last parts of a path. Returns the model;
    ``report(model)`` says what was saved. Raises ConfigError where ``kind`` is unknown or ``skip`` matches nothing.
    """
    if kind != "nf4":
        raise ConfigError(f"quant: '{kind}' is unknown. Allowed: nf4.")
    for path in quantizable(model, skip):
        parent, _, name = path.rpartition(".")
        layer: Any = model.get_submodule(path)
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight  # (out, in)
        new = NF4Linear.from_dense(weight, layer.bias, double=double, compute_dtype=compute_dtype)
        setattr(model.get_submodule(parent), name, new.train(layer.training))
    return model


def quantizable(model: nn.Module, skip: Sequence[str]) -> list[str]:
    """Paths of the linear-like layers that ``skip`` and the head leave; each weight (out, in) fills whole blocks."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    linear = {path: m for path, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    for pattern in skip:
        if pattern != "lm_head" and not any(named(path, pattern) for path in linear):
            close = nearest(pattern.rpartition(".")[2], {path.rpartition(".")[2] for path in linear})
            hint = f" Nearest: '{close}'." if close else ""
            raise ConfigError(f"quant.skip: '{pattern}' matches no linear layer.{hint}")
    return [
        path
        for path, layer in linear.items()
        if layer is not head and not any(named(path, pattern) for pattern in skip)
    ]


def named(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or path.rpartition(".")[2] == pattern


def report(model: nn.Module) -> QuantReport:
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    before = sum(4 * m.in_features * m.out_features for m in layers)
    return QuantReport(len(layers), before, sum(m.nbytes for m in layers))


def load_quantized(
    skeleton: Model,
    files: Sequence[Path],
    *,
    dtype: torch.dtype,
    double: bool = True,
    skip: Sequence[str] = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
) -> Model:
    """Fills a model on the meta device from safetensors files, quantising each linear weight as it is read.

    Never more than one dense layer is held beside the 4-bit model. Weights that stay dense are kept in ``dtype``.
    Raises KeyError where the files' names are not the model's own (an architecture whose weights transformers
    rewrites on loading): load it dense and ``quantize`` it then.
    """
    layers = allocated(skeleton, quantizable(skeleton, skip), double=double, compute_dtype=compute_dtype)
    filled: set[str] = set()
    for name, tensor in tensors_of(files):
        path, _, leaf = name.rpartition(".")
        layer = owner(skeleton, path)
        if path in layers and leaf == "weight":
            layer.fill((tensor.T if layers[path] else tensor).to(dtype))
        elif leaf in layer._parameters:
            layer._parameters[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)
        elif leaf in layer._buffers:
            layer._buffers[leaf] = tensor
        else:
            raise KeyError(name)
        filled.add(name)
    lacking = [f"{path}.weight" for path in layers if f"{path}.weight" not in filled]
    if lacking:
        raise KeyError(lacking[0])
    finish(skeleton)
    return skeleton


def allocated(skeleton: nn.Module, paths: Sequence[str], **options: Any) -> dict[str, bool]:
    """Puts an NF4 layer without values on each path, on the CPU; returns whether its file's weight is transposed.

    All state is allocated before the first weight is read: the work space of one layer then lies above it and is
    reused for the next, where small results between large temporaries would hold the whole heap.
    """
    transposed = {}
    for path in paths:
        old: Any = skeleton.get_submodule(path)
        transposed[path] = isinstance(old, Conv1D)
        rows, columns = old.weight.T.shape if transposed[path] else old.weight.shape
        new = NF4Linear(columns, rows, **options)
        new.allocate("cpu")
        new.bias = old.bias if old.bias is None else nn.Parameter(old.bias, requires_grad=False)
        parent, _, child = path.rpartition(".")
        setattr(skeleton.get_submodule(parent), child, new.train(old.training))
    return transposed


def owner(skeleton: nn.Module, path: str) -> Any:
    try:
        return skeleton.get_submodule(path)
    except AttributeError as error:
        raise KeyError(path) from error


def tensors_of(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, copied out one at a time; the mapping is closed between two, so that pages read
    for one do not count while the next is worked on."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        for name in names:
            with safe_open(file, framework="pt") as opened:
                yield name, opened.get_tensor(name).clone()


def finish(skeleton: nn.Module) -> None:
    """Ties what the architecture ties and rebuilds the buffers that no file holds (rotary frequencies)."""
    tie = getattr(skeleton, "tie_weights", None)
    if tie is not None:
        tie()
    for module in skeleton.modules():
        if any(b is not None and b.is_meta for b in module._buffers.values()):
            rebuild_buffers(module)
    empty = [name for name, p in skeleton.named_parameters() if p.is_meta]
    if empty:
        raise KeyError(empty[0])


def rebuild_buffers(module: nn.Module) -> None:
    """Buffers that are computed in the constructor: run it again, on the CPU, for this module alone."""
    config = getattr(module, "config", None)
    if config is None:
        raise KeyError(f"{type(module).__name__} has a buffer that no file holds")
    with torch.device("cpu"):
        fresh = type(module)(config)
    for name, buffer in fresh._buffers.items():
        module._buffers[name] = buffer
