"""Cross-entropy through a frozen head, its gradient made in the forward pass.

loss = Σ −log softmax(z)[target], z = cap·tanh(s·W h / cap). Of logits no more than a chunk is there at once, and of
all of them nothing is kept: d loss/dh = Wᵀ(softmax(z) − onehot)·dz is of the width of h (arXiv 2411.09009 saves the
logits' memory too, and makes them twice). PyTorch 2.13's ``linear_cross_entropy`` takes no scale and no cap, and at 96
rows of a head of 49,152 × 576 in fp32 on one core took ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank.adapters.base import LINEAR
from lowrank.fast import linear, seen
from lowrank.fast.site import compute_dtype, dense

Loss = Callable[[Any, Any], Tensor]
CHUNK = 64 << 20  # bytes of fp32 logits at once …
ROWS = {"cpu": 128}  # … but so many rows at least, 1,024 elsewhere: a product of few is slow


@dataclass(frozen=True)
class Head:
    """The last layer and what a model does to its output."""

    layer: Any  # Linear or NF4Linear, frozen
    scale: float = 1.0
    cap: float | None = None


# Models whose logits are those of their head alone, times a scale, through a cap.
KNOWN: dict[str, Callable[[Any, Any], Head]] = {
    **dict.fromkeys(
        ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"),
        lambda layer, config: Head(layer),
    ),
    **dict.fromkeys(
        ("GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM", "MixtralForCausalLM", "GemmaForCausalLM"),
        lambda layer, config: Head(layer),
    ),
    "Gemma2ForCausalLM": lambda layer, config: Head(layer, cap=config.final_logit_softcapping),
    "CohereForCausalLM": lambda layer, config: Head(layer, scale=config.logit_scale),
    "GraniteForCausalLM": lambda layer, config: Head(layer, scale=1 / config.logits_scaling),
}


def head_of(model: Any) -> Head | None:
    """The model's head, where it is a frozen bare layer of an architecture whose logits are known; else None."""
    layer: nn.Module = model.get_output_embeddings()
    if type(model).__name__ not in KNOWN or type(layer) not in LINEAR or "forward" in vars(model):
        return None
    if seen.hooked(model) or seen.hooked(layer) or seen.watched() or any(p.requires_grad for p in layer.parameters()):
        return None
    return KNOWN[type(model).__name__](layer, model.config)


def describe(model: Any) -> str:
    return "loss plain (its head trains, or is not known)" if head_of(model) is None else "loss in chunks"


def chunked(otherwise: Loss) -> Loss:
    """A loss by ``FrozenHeadLoss`` for models whose head is one that is known, and by ``otherwise`` for the others:
    the summed −log p of a batch's target tokens, a scalar."""

    def target_loss(model: Any, batch: Any) -> Tensor:
        head = head_of(model)
        return otherwise(model, batch) if head is None else head_loss(hidden(model, batch), batch.targets, head)

    return target_loss


def each_chunked(otherwise: Loss) -> Loss:
    """The same of a loss that is not summed: (targets,), the −log p of each target token."""

    def target_losses(model: Any, batch: Any) -> Tensor:
        head = head_of(model)
        return otherwise(model, batch) if head is None else head_losses(hidden(model, batch), batch.targets, head)

    return target_losses


def hidden(model: Any, batch: Any) -> Tensor:
    """(targets, d): what the head reads to predict a batch's targets."""
    found = model.base_model(**batch.inputs, use_cache=False).last_hidden_state  # (rows, width, d)
    return found.flatten(0, 1)[batch.positions]


def head_loss(h: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Summed over rows: h (rows, d), targets (rows,)."""
    return FrozenHeadLoss.apply(h, targets, head, h.requires_grad and torch.is_grad_enabled())


def head_losses(h: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Row by row: h (rows, d), targets (rows,) → (rows,)."""
    return FrozenHeadLosses.apply(h, targets, head, h.requires_grad and torch.is_grad_enabled())


class FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, targets: Tensor, head: Head, wanted: bool) -> Tensor:
        grad = torch.empty_like(h) if wanted else None
        total = h.new_zeros((), dtype=statistics(compute_dtype(h)))
        for losses in by_chunk(h, targets, head, grad):
            total += losses.sum()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (of_h,) = ctx.saved_tensors
        return of_h * grad.to(of_h.dtype), None, None, None


class FrozenHeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, targets: Tensor, head: Head, wanted: bool) -> Tensor:
        grad = torch.empty_like(h) if wanted else None
        losses = list(by_chunk(h, targets, head, grad))
        ctx.save_for_backward(grad)
        return torch.cat([h.new_empty(0, 1, dtype=statistics(compute_dtype(h))), *losses]).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (of_h,) = ctx.saved_tensors
        return of_h * grad[:, None].to(of_h.dtype), None, None, None


def by_chunk(h: Tensor, targets: Tensor, head: Head, grad: Tensor | None) -> Iterator[Tensor]:
    """−log p of each target, (chunk, 1) at a time; its gradient for h is written to ``grad`` where that is given."""
    dtype = compute_dtype(h)
    weight = dense(head.layer, dtype).to(dtype)  # (vocabulary, d)
    rows = rows_at_once(weight.shape[0], h.device)
    for first in range(0, len(h), rows):
        part, wished = h[first : first + rows].to(dtype), targets[first : first + rows, None]
        with torch.autocast(h.device.type, enabled=False):
            z = capped(linear.product(part, weight, head.layer.bias).to(statistics(dtype)), head)  # (chunk, vocabulary)
            lse = torch.logsumexp(z, -1, keepdim=True)  # (chunk, 1)
            losses = lse - z.gather(1, wished)
            if grad is not None:
                grad[first : first + rows] = linear.product(slope_(z, lse, wished, head).to(dtype), weight.T)
            del z  # before the next one is there
        yield losses


def statistics(dtype: torch.dtype) -> torch.dtype:
    """What logits are in, of products in ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """Of logits."""
    return max(ROWS.get(device.type, 1024), CHUNK // (4 * vocabulary))


def capped(z: Tensor, head: Head) -> Tensor:
    z = z.mul_(head.scale) if head.scale != 1.0 else z
    return z if head.cap is None else z.div_(head.cap).tanh_().mul_(head.cap)


def slope_(z: Tensor, lse: Tensor, targets: Tensor, head: Head) -> Tensor:
    """∂loss/∂(W h) = (softmax(z) − onehot)·dz, written over z; targets and ``lse`` (chunk, 1)."""
    bent = None if head.cap is None else (z / head.cap).square_().neg_().add_(1)  # the slope of cap·tanh
    p = z.sub_(lse).exp_()
    p.scatter_add_(1, targets, p.new_full(targets.shape, -1.0))
    p = p if bent is None else p.mul_(bent)
    return p if head.scale == 1.0 else p.mul_(head.scale)
