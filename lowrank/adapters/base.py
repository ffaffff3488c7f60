"""The one contract of every adapter: it owns the call, the base owns its weight.

``Adapted`` puts an ``Adapter`` around a module of the model. The adapter sees the base at every call and may
change its inputs, its outputs, its weight, or all three; it never keeps the base, so its parameters are its own.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.keys import Clock
from lowrank.quant.nf4 import NF4Linear

LINEAR = (nn.Linear, Conv1D, NF4Linear)


class NotMergeable(TypeError):
    """The wrapped call cannot be written as one dense weight and bias."""


class Adapter(nn.Module):
    """``y = adapter(base, *args, **kwargs)``.

    A method is a subclass with a constructor ``(base, *, generator, **options)`` that reads the base's shape
    (``shape(base)``) and draws its initial values from ``generator``; a bad option raises
    ``ValueError("r: 0 is not allowed; a positive integer.")``. Every trainable value is an fp32 parameter.
    """

    sites: ClassVar[tuple[str, ...]] = ("linear",)  # any of "linear" "embedding" "block" "backbone" "parameter"
    identity_at_start: ClassVar[bool | Literal["rounding"]] = True  # checked before the first step

    clock: Clock = Clock()  # replaced by the run's own when the adapter is applied
    group: str = ""  # sites of one parent with one input width share a group, and so their dropout mask

    @classmethod
    def shared(
        cls, shapes: dict[str, tuple[int, int]], *, generator: torch.Generator, **options: Any
    ) -> dict[str, Any]:
        """What all sites of one rule share, as keywords for each constructor (VeRA's A and B)."""
        return {}

    @classmethod
    def hook(cls, adapters: dict[str, Adapter], *, steps: int) -> Any | None:
        """Behaviour over time (AdaLoRA's budget): an object with the loop's hook methods, or None."""
        return None

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} does not define forward(base, *args, **kwargs)")

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The dense (weight, bias) equal to the wrapped call; pure. ``weight`` is (out, in)."""
        raise NotMergeable(f"{type(self).__name__} is not a change of weight and bias")

    def penalty(self) -> Tensor | float:
        """Added to the loss once an optimizer step (AdaLoRA's orthogonality)."""
        return 0.0


class Adapted(nn.Module):
    """A module of the model with its adapter: ``base.*`` and ``adapter.*``."""

    def __init__(self, base: nn.Module, adapter: Adapter, options: dict[str, Any]) -> None:
        super().__init__()
        self.base, self.adapter, self.options = base, adapter, options
        self.train(base.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapter(self.base, *args, **kwargs)


def dense_weight(base: nn.Module) -> Tensor:
    """The weight of a linear-like site or an embedding as (out, in): the one visible dequantisation.

    For an embedding of V rows and width d, y = W x with x one-hot: (d, V), a view of its (V, d) table.
    """
    match base:
        case NF4Linear():
            return base.dequantize()
        case nn.Linear():
            return base.weight
        case Conv1D() | nn.Embedding():
            return base.weight.T
        case _:
            raise TypeError(f"{type(base).__name__} has no dense weight")


def shape(base: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear-like site or an embedding, without touching its weight."""
    match base:
        case NF4Linear() | nn.Linear():
            return base.out_features, base.in_features
        case Conv1D():
            return base.nf, base.nx
        case nn.Embedding():
            return base.embedding_dim, base.num_embeddings
        case _:
            raise TypeError(f"{type(base).__name__} has no (out, in) shape")
