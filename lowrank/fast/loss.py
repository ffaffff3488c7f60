"""Cross-entropy through a frozen head, its gradient made in the forward pass.

loss = Σ −log softmax(z)[target], z = cap·tanh(s·W h / cap). Of logits no more than a chunk is there at once, and of
all of them nothing is kept: d loss/dh = Wᵀ(softmax(z) − onehot)·dz is of the width of h (arXiv 2411.09009 saves the
logits' memory too, and makes them twice).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank.adapters.base import LINEAR, dense_weight
from lowrank.fast import linear
from lowrank.fast.site import compute_dtype

Loss = Callable[[Any, Any], Tensor]
CHUNK = 64 << 20  # bytes of fp32 logits at once …
ROWS = 256  # … but so many rows at least: a product of few is slow


@dataclass(frozen=True)
class Head:
    """The last layer and what a model does to its output."""

    layer: Any  # Linear or NF4Linear, frozen
    scale: float = 1.0
    cap: float | None = None


def head_of(model: Any) -> Head | None:
    """The model's head, where it is a frozen bare layer of an architecture whose logits are known; else None."""
    known = {
        **dict.fromkeys(("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"), Head),
        "GPT2LMHeadModel": Head,
        "Gemma2ForCausalLM": lambda layer: Head(layer, cap=model.config.final_logit_softcapping),
        "CohereForCausalLM": lambda layer: Head(layer, scale=model.logit_scale),
        "GraniteForCausalLM": lambda layer: Head(layer, scale=1 / model.config.logits_scaling),
    }
    layer: nn.Module = model.get_output_embeddings()
    if type(model).__name__ not in known or type(layer) not in LINEAR or layer._forward_hooks:
        return None
    return None if any(p.requires_grad for p in layer.parameters()) else known[type(model).__name__](layer)


def describe(model: Any) -> str:
    return "loss plain (its head trains, or is not known)" if head_of(model) is None else "loss in chunks"


def chunked(otherwise: Loss) -> Loss:
    """A loss by ``FrozenHeadLoss`` for models whose head is one that is known, and by ``otherwise`` for the others:
    the summed −log p of a batch's target tokens, a scalar."""

    def target_loss(model: Any, batch: Any) -> Tensor:
        head = head_of(model)
        if head is None:
            return otherwise(model, batch)
        hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state  # (rows, width, d)
        return head_loss(hidden.flatten(0, 1)[batch.positions], batch.targets, head)

    return target_loss


def head_loss(h: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Summed over rows: h (rows, d), targets (rows,)."""
    return FrozenHeadLoss.apply(h, targets, head, h.requires_grad and torch.is_grad_enabled())


class FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, targets: Tensor, head: Head, wanted: bool) -> Tensor:
        dtype = compute_dtype(h)
        weight = dense_weight(head.layer).to(dtype)  # (vocabulary, d)
        statistics = torch.promote_types(dtype, torch.float32)
        rows = max(ROWS, CHUNK // (4 * weight.shape[0]))
        total = h.new_zeros((), dtype=statistics)
        grad = torch.empty_like(h) if wanted else None
        with torch.autocast(h.device.type, enabled=False):
            for first in range(0, len(h), rows):
                part, wished = h[first : first + rows].to(dtype), targets[first : first + rows]
                z = capped(linear.product(part, weight, head.layer.bias).to(statistics), head)  # (chunk, vocabulary)
                total += torch.logsumexp(z, -1).sub_(z.gather(1, wished[:, None])[:, 0]).sum()
                if grad is not None:
                    grad[first : first + rows] = linear.product(slope(z, wished, head).to(dtype), weight.T)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (of_h,) = ctx.saved_tensors
        return of_h * grad.to(of_h.dtype), None, None, None


def capped(z: Tensor, head: Head) -> Tensor:
    z = z.mul_(head.scale) if head.scale != 1.0 else z
    return z if head.cap is None else z.div_(head.cap).tanh_().mul_(head.cap)


def slope(z: Tensor, targets: Tensor, head: Head) -> Tensor:
    """∂loss/∂(W h), written over z except where a cap's own slope is needed."""
    bent = None if head.cap is None else (z / head.cap).square_().neg_().add_(1)  # of tanh
    p = torch.softmax(z, -1)
    p.scatter_add_(1, targets[:, None], p.new_full((len(targets), 1), -1.0))
    p = p if bent is None else p.mul_(bent)
    return p if head.scale == 1.0 else p.mul_(head.scale)
