"""Causal attention of packed documents on a CPU, keeping its output once.

softmax(q kᵀ · scale) v within each document, by PyTorch's flash kernel for CPUs (arXiv 2205.14135). Document by
document through autograd, each one's output is kept beside the row that they are put together to; here backward reads
the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class DocumentAttention(torch.autograd.Function):
    """q (1, heads, tokens, width), k and v (1, kv heads, tokens, width) → (1, tokens, heads, width)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, edges: Sequence[int], scale: float | None) -> Tensor:
        out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3])
        lse = []  # (1, heads, length) each
        for a, b in pairwise(edges):
            part, sums = KERNEL(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], 0.0, True, scale=scale)
            out[:, a:b] = part.transpose(1, 2)
            lse.append(sums)
        ctx.save_for_backward(q, k, v, out, *lse)
        ctx.edges, ctx.scale = edges, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *lse = ctx.saved_tensors
        grad, out = grad.transpose(1, 2), out.transpose(1, 2)  # (1, heads, tokens, width)
        grads = [torch.empty_like(each) for each in (q, k, v)]
        for (a, b), sums in zip(pairwise(ctx.edges), lse, strict=True):
            cut = slice(None), slice(None), slice(a, b)
            found = BACKWARD(grad[cut], q[cut], k[cut], v[cut], out[cut], sums, 0.0, True, scale=ctx.scale)
            for whole, part in zip(grads, found, strict=True):
                whole[cut] = part
        return *grads, None, None
