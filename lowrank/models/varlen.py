"""Attention of all documents of a pack in one kernel: PyTorch's flash attention for variable lengths, where it serves.

softmax(q kᵀ · scale) v within each document (arXiv 2307.08691). It exists on CUDA in half precision; everywhere else
attention goes document by document.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older PyTorch
    varlen_attn = None

AMPERE = (8, 0)  # the oldest GPUs that the kernel is written for
WIDEST = 256  # a head, and a multiple of 8
KEPT = "_lowrank_device"  # where a pack's boundaries keep their copy on the device


def why_not(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """What keeps the kernel from these (batch, heads, tokens, head width), or None."""
    if varlen_attn is None or not {"window_size", "scale"} <= parameters(varlen_attn):
        return "this PyTorch has no attention for variable lengths"
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) < AMPERE:
        return "it needs CUDA and compute capability 8.0"
    if compute_dtype(query) not in (torch.float16, torch.bfloat16):
        return "it needs half precision"
    if key.shape != value.shape or query.shape[3] != key.shape[3]:
        return "it needs heads of one width"
    return None if query.shape[3] % 8 == 0 and query.shape[3] <= WIDEST else "it needs heads of 8, 16, … 256"


def attention(
    query: Tensor, key: Tensor, value: Tensor, edges: Tensor, *, window: int | None, scale: float | None
) -> Tensor:
    """q (1, heads, tokens, width), k and v (1, kv heads, tokens, width) → (1, tokens, heads, width).

    With a window, each token sees the last ``window``, its own among them.
    """
    dtype, shared = compute_dtype(query), query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0), "scale": scale}
    if "enable_gqa" in parameters(varlen_attn):
        options["enable_gqa"], shared = shared > 1, 1
    q, k, v = (each[0].transpose(0, 1).to(dtype) for each in (query, key, value))  # (tokens, heads, width)
    if shared > 1:
        k, v = (each.repeat_interleave(shared, dim=1) for each in (k, v))
    there, longest = on_device(edges, query.device)
    return varlen_attn(q, k, v, there, there, longest, longest, **options)[None]


def on_device(edges: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """The boundaries as the kernel takes them, int32 on the device, and the longest document's length.

    Made at the first layer that asks and kept with ``edges``, which is the same object in every layer of a forward
    and of its recomputation: with boundaries in the host's memory no layer waits for the device.
    """
    kept: tuple[Tensor, int] | None = vars(edges).get(KEPT)
    if kept is None or kept[0].device != device:
        kept = edges.to(torch.int32).to(device, non_blocking=True), int(edges.diff().max())
        setattr(edges, KEPT, kept)
    return kept


def compute_dtype(query: Tensor) -> torch.dtype:
    """Autocast's inside of it, as for PyTorch's own attention."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


@cache
def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Those of ``varlen_attn`` have changed between releases."""
    return frozenset(inspect.signature(function).parameters)
