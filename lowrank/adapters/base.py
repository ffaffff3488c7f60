"""The one contract of every adapter: it owns the call, the base owns its weight.

``Adapted`` puts an ``Adapter`` around a module of the model. The adapter sees the base at every call and may
change its inputs, its outputs, its weight, or all three; it never keeps the base, so its parameters are its own.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.errors import ConfigError
from lowrank.keys import Clock
from lowrank.quant.nf4 import NF4Linear

LINEAR = (nn.Linear, Conv1D, NF4Linear)


class NotMergeable(TypeError):
    """The wrapped call cannot be written as one dense weight and bias."""


class PastTheCall(ConfigError, AttributeError):
    """A wrapped layer is asked for what the adapter has no part in; to ``hasattr`` it is not there."""


class Adapter(nn.Module):
    """``y = adapter(base, *args, **kwargs)``.

    A method is a subclass with a constructor ``(base, *, generator, **options)`` that reads the base's shape
    (``shape(base)``) and draws its initial values from ``generator``; a bad option raises
    ``ValueError("r: 0 is not allowed; a positive integer.")``. Every trainable value is an fp32 parameter.
    """

    sites: ClassVar[tuple[str, ...]] = ("linear",)  # any of "linear" "embedding" "block" "backbone" "parameter"
    identity_at_start: bool | Literal["rounding"] = True  # of the class, or of one with certain options; checked
    trains: ClassVar[str] = "*"  # of "parameter" methods: which of the base's parameters they take, as a pattern
    texts: ClassVar[tuple[str, ...]] = ()  # options that are text to a user, and their token ids to the constructor

    # Names of parameters whose gradient leaves a term out on purpose, as their paper says (DoRA's norm is a constant).
    gradient_leaves_out: ClassVar[tuple[str, ...]] = ()

    clock: Clock = Clock()  # replaced by the run's own when the adapter is applied
    group: str = ""  # sites of one parent with one input width share a group, and so their dropout mask
    virtual_tokens: int = 0  # positions of the model that its own rows take before every text

    @classmethod
    def shared(
        cls, shapes: dict[str, tuple[int, int]], *, generator: torch.Generator, **options: Any
    ) -> dict[str, Any]:
        """What all sites of one rule share (VeRA's A and B): keywords ``shared_…`` for each constructor.

        A shared tensor is an ``nn.Parameter`` that every adapter holds: it stays one through ``.to`` and copies, and
        an adapter's file holds it once. ``shapes`` are the sites' (out, in) by path.
        """
        return {}

    @classmethod
    def hook(cls, adapters: dict[str, Adapter], *, steps: int) -> Any | None:
        """Behaviour over time (AdaLoRA's budget): an object with the loop's hook methods, or None."""
        return None

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} does not define forward(base, *args, **kwargs)")

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(A (r, in), B (out, r)) where the method adds B A x to the base's output, scale included; else None.

        Enough to merge it, to look into it and to export it as a LoRA.
        """
        return None

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The dense (weight, bias) equal to the wrapped call; pure. ``weight`` is (out, in), the base's that is now."""
        found = self.factors()
        if found is None:
            raise NotMergeable(f"{type(self).__name__} is not a change of weight and bias")
        A, B = found
        return weight + B.to(weight.dtype) @ A.to(weight.dtype), bias  # (out, in)

    def rebased(self, base: nn.Module) -> nn.Module:
        """The base that the adapter stands on: ``base`` itself, or a new one where the start changes it (PiSSA).

        It may read ``base`` and the adapter's own state alone, so that a saved adapter finds the same base again.
        """
        return base

    def penalty(self) -> Tensor | float:
        """Added to the loss once an optimizer step (AdaLoRA's orthogonality)."""
        return 0.0


class Adapted(nn.Module):
    """A module of the model with its adapter: ``base.*`` and ``adapter.*``.

    ``kept`` holds the module that stood here before: ``base`` itself, the one that the adapter's start has changed
    into ``base``, or nothing where that was not kept. In a tuple it is no submodule of this one. While it is
    ``bypassed`` (``lowrank.disable``) calls go there.
    """

    bypassed = False

    def __init__(
        self,
        base: nn.Module,
        adapter: Adapter,
        options: dict[str, Any],
        kept: tuple[nn.Module, ...] | None = None,
    ) -> None:
        super().__init__()
        self.base, self.adapter, self.options = base, adapter, options
        self.kept = (base,) if kept is None else kept
        self.train(base.training)

    @property
    def original(self) -> nn.Module | None:
        return self.kept[0] if self.kept else None

    @property
    def positions_taken(self) -> int:
        """Positions of the model that rows of the adapter take before every text in a call as it is now."""
        return 0 if self.bypassed else self.adapter.virtual_tokens

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.original is not None and self.original is not self.base:
            self.original._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.bypassed and self.original is not None:
            return self.original(*args, **kwargs)
        return self.adapter(self.base, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """A block's and a backbone's attributes show through: models read them past the call. A layer's do not, so
        that code which takes ``.weight`` and skips the adapter fails instead."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None:
                raise
            if isinstance(base, (*LINEAR, nn.Embedding)):
                if hasattr(base, name):
                    raise PastTheCall(past(self, name)) from None
                raise
            return getattr(base, name)


def past(site: Adapted, name: str) -> str:
    parent, size = site.adapter.group.partition(":")[0] or "the model", "×".join(str(n) for n in shape(site.base))
    return (
        f"the model reads .{name} of a {size} layer in {parent} itself, past its {type(site.adapter).__name__}, which "
        f"would be without effect. Leave that layer out (adapter.exclude)."
    )


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
            raise NotMergeable(f"{type(base).__name__} has no dense weight")


def shape(base: nn.Module) -> tuple[int, int]:
    """(out, in) of a site, without touching its weight; of a block or a backbone (width, width)."""
    match base:
        case NF4Linear() | nn.Linear():
            return base.out_features, base.in_features
        case Conv1D():
            return base.nf, base.nx
        case nn.Embedding():
            return base.embedding_dim, base.num_embeddings
        case _:
            width = hidden_size(base)
            return width, width


def hidden_size(base: Any) -> int:
    """The width of a block's or a backbone's hidden states: its configuration's, else that of its first norm."""
    config = getattr(base, "config", None)
    found = getattr(config.get_text_config() if config is not None else base, "hidden_size", None)
    if isinstance(found, int):
        return found
    norm = next((p for p in base.parameters() if p.ndim == 1 and p.is_floating_point()), None)
    if norm is None:
        raise TypeError(f"{type(base).__name__} has no (out, in) shape")
    return norm.numel()
