"""Recomputation: less is kept between forward and backward, and some of the forward is done twice.

What a fused block (block.py) keeps, in bytes a token, and the FLOPs a token that are done twice. r is the size of a
number of the residual stream, c of one that products compute in, u the width of all that goes into the feed-forward's
activation (2f where it is gated, else f), s a document's length:

    off         r·2d + c·(2q + 2kv + u) + 4·heads + 4·statistics     none
    selective   the same without c·u                                 2·d·u
    block       r·d                                                  2·d·(2q + 2kv + u) + 2·s·q

Where q and k have norms of their own, both are kept from before them too.

Every product costs 2·d_in FLOPs a number, so by FLOPs a byte none is better to do again than another; attention, the
only part that grows with s, is what ``selective`` never repeats. It repeats the feed-forward's first products: more
than half of the bytes, and their input is kept for the norm anyway. ``block`` leaves out the last product, whose
output nobody reads. Plain blocks: ``block`` repeats all of one, ``selective`` its feed-forward module.

The same operations on the same numbers: gradients are those of ``off`` to the bit, wherever the kernels repeat
themselves to the bit. A clock's masks are drawn again at the same time; torch's generators are put back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from lowrank.adapters.base import LINEAR, Adapted, shape
from lowrank.adapters.sites import blocks, walk
from lowrank.errors import ConfigError
from lowrank.fast import block as fused
from lowrank.fast.functions import Keep
from lowrank.fast.offload import Offload

MODES = ("off", "block", "selective")


@dataclass(frozen=True)
class Widths:
    """Of one fused block: what recomputation is to it, a token."""

    d: int  # hidden
    q: int  # queries, and attention's output
    kv: int  # keys, and values
    u: int  # what goes into the feed-forward's activation
    heads: int
    statistics: int  # numbers a row that its norms keep
    own_norms: bool  # of q and k

    def kept(self, mode: str, residual: int = 4, compute: int = 4) -> int:
        """Bytes between forward and backward; sizes of a number of the residual stream and of a product in bytes."""
        if mode == "block":
            return residual * self.d
        before = self.q + self.kv if self.own_norms else 0
        products = 2 * self.q + 2 * self.kv + before + (0 if mode == "selective" else self.u)
        return residual * 2 * self.d + compute * products + 4 * (self.heads + self.statistics)

    def again(self, mode: str, residual: int = 4, compute: int = 4) -> int:
        """Bytes that backward holds besides, of one block at a time: what was not kept of it."""
        return self.kept("off", residual, compute) - self.kept(mode, residual, compute)

    def flops(self, mode: str, length: float) -> float:
        """More than without recomputation; adapters' own, of their ranks' size, are not counted."""
        attention = 4 * self.d * (self.q + self.kv) + 2 * length * self.q
        return {"off": 0, "selective": 2 * self.d * self.u, "block": 2 * self.d * self.u + attention}[mode]


def widths(module: Any) -> Widths:
    """Of a block of a class that ``block.BLOCKS`` knows, on any device, meta included."""
    layout = fused.BLOCKS[type(module).__name__]
    attn, mlp = getattr(module, layout.attention), getattr(module, layout.mlp)
    d, q = shape(bare(getattr(attn, layout.output)))
    read = sum(shape(bare(getattr(attn, name)))[0] for name in layout.inputs)  # q + 2·kv
    u = sum(shape(bare(getattr(mlp, name)))[0] for name in layout.feed_forward[:-1])
    kv, heads = (read - q) // 2, attn.config.num_attention_heads
    rows = 2 + (heads + kv * heads // q if layout.head_norms else 0)
    each = 2 if isinstance(getattr(module, layout.norms[0]), nn.LayerNorm) else 1
    return Widths(d, q, kv, u, heads, each * rows, bool(layout.head_norms))


@dataclass
class Repeated:
    """What is set on a module that keeps its inputs alone, as its attribute ``repeated``."""

    forward: Callable[..., Any]  # what computes
    offload: Callable[[], AbstractContextManager[Any]] = nullcontext  # in which the inputs are kept


def recompute(model: nn.Module, mode: str, offload: Offload | None = None) -> str:
    """Sets it on the decoder's blocks in place of what was set: the line that tells of it, empty for ``off``.

    After ``fuse``. With ``offload`` the kept inputs wait on the host. Raises ConfigError where no blocks are found.
    """
    undo(model)
    if mode == "off":
        return ""
    standing, paths = dict(walk(model)), blocks(model)
    if not paths:
        raise ConfigError(f"loop.gradient_checkpointing: {type(model).__name__} has no list of blocks; off.")
    if offload is not None:
        offload.begin(len(paths))
    found = Counter(
        repeat(standing[path], offload.of(number) if offload else nullcontext)
        if mode == "block"
        else select(standing[path])
        for number, path in enumerate(paths)
    )
    parts = ", ".join(f"{count}/{len(paths)} {what}" for what, count in found.items())
    return f"recomputation: {parts}{', inputs on the host' if offload else ''}"


def undo(model: nn.Module) -> None:
    for module in model.modules():
        vars(module).pop("keep", None)
        repeated = vars(module).pop("repeated", None)
        if repeated is not None:
            del module.forward
            if getattr(repeated.forward, "__func__", None) is not type(module).forward:  # it was the instance's own
                module.forward = repeated.forward


def select(module: nn.Module) -> str:
    """Sets on a block, with the adapter around it if there is one, what is cheap to repeat; says what that is."""
    inner = bare(module)
    part = feed_forward(inner)
    if part is not None:  # which a fused block calls only where it runs plain after all
        repeat(part)
    if is_fused(inner.forward):
        inner.keep = Keep.INPUT
        return "blocks' first products of the feed-forward"
    return repeat(module) if part is None else "plain blocks' feed-forwards"


def repeat(module: Any, offload: Callable[[], AbstractContextManager[Any]] = nullcontext) -> str:
    """Sets on a module that it keeps its inputs alone; says so."""
    module.repeated = Repeated(module.forward, offload)
    module.forward = MethodType(forward, module)
    return "blocks whole"


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of a module's own: a cache, which would be written twice, is not for it."""
    cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
    if cached or not torch.is_grad_enabled():
        return self.repeated.forward(*args, **kwargs)
    compute = partial(self.repeated.forward, **kwargs)
    with self.repeated.offload():
        return checkpoint(compute, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), repeating(self)))


@contextmanager
def repeating(module: Any) -> Iterator[None]:
    """A fused block is called for what it keeps alone."""
    if is_fused(module.repeated.forward):
        module.keep = Keep.UNREAD
    try:
        yield
    finally:
        vars(module).pop("keep", None)


def is_fused(forward: Any) -> bool:
    """Whether it is block.py's."""
    return getattr(forward, "__func__", None) is fused.forward


def bare(module: nn.Module) -> Any:
    return module.base if isinstance(module, Adapted) else module


def feed_forward(block: nn.Module) -> nn.Module | None:
    """The one part of a block with matrices that is not attention; None where there is none, or more."""
    parts = [
        child
        for child in block.children()
        if "attention" not in type(bare(child)).__name__.lower() and any(has_matrix(m) for m in child.modules())
    ]
    return parts[0] if len(parts) == 1 and any(True for _ in bare(parts[0]).children()) else None


def has_matrix(module: nn.Module) -> bool:
    return isinstance(module, LINEAR) or any(p.ndim > 1 for p in module.parameters(recurse=False))
