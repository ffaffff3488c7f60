"""What one micro-batch takes, segment by segment: the run's own forward, loss, backward and update without values."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lowrank import assemble
from lowrank.adapters.inject import named_trainable
from lowrank.adapters.sites import backbone, blocks, sites, walk
from lowrank.assemble import Parts
from lowrank.data.pack import pack, pad
from lowrank.eval.mode import evaluating
from lowrank.ledger.bare import Bare
from lowrank.ledger.live import Live
from lowrank.ledger.shapes import texts
from lowrank.train.loss import target_loss
from lowrank.train.precision import Precision

Found = dict[tuple[str, str], float]  # (segment, tag) → bytes at the segment's peak; (FLOPS, "forward") → FLOPs
FORWARD, FLOPS = ("forward", "loss"), "flops"


def found(live: Live) -> Found:
    sizes = {(segment, tag): float(n) for segment, tags in live.most.items() for tag, n in tags.items() if tag}
    forward = sum(live.flops[segment] for segment in FORWARD)
    return sizes | {(FLOPS, "forward"): forward, (FLOPS, "backward"): live.flops.total() - forward}


def resting(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def trained(
    bare: Bare, kept: Sequence[int], parts: Parts, lengths: Sequence[int], targets: int, *, plain: bool = False
) -> Found:
    """Forward and backward of a micro-batch; ``plain``, as the pre-flight makes them."""
    model, live = bare.model, Live(resting(bare.model))
    loss = target_loss if plain else assemble.loss(parts.config)
    model.train(not plain)
    batch = (pack if bare.packed else pad)(texts(lengths, targets))
    gradients(model, bare, kept=parts.config.loop.accumulate > 1 and not plain)
    with told(model, kept, live, parts.config.optim.in_backward), bare.mode, live:
        live.segment, live.tag = "forward", "activations"
        with Precision(parts.precision, parts.device).autocast():
            total = loss(model, on(batch, parts.device))
        live.segment, live.tag = "backward", "loss"
        (total / max(targets, 1)).backward()
    model.zero_grad(set_to_none=True)
    return found(live)


def gradients(model: nn.Module, bare: Bare, *, kept: bool) -> None:
    """Those that are there from an earlier micro-batch of the same step."""
    for parameter in model.parameters():
        with bare.mode:
            parameter.grad = torch.empty_like(parameter) if kept and parameter.requires_grad else None


def on(batch: Any, device: torch.device) -> Any:
    """The batch itself on a CPU: its boundaries are read."""
    return batch if device.type == "cpu" else batch.to(device)


@contextmanager
def told(model: nn.Module, kept: Sequence[int], live: Live, at_once: bool) -> Iterator[None]:
    """Tells ``live`` where the model is: in its blocks or behind them, on the way there or back."""
    known, paths = dict(sites(model)), blocks(model)
    trunk = known.get(backbone(model) or "")
    handles: list[Any] = []
    for path, segment in zip(paths, marks(kept), strict=True):
        handles += in_block(stands(model, path), segment, live)
    if trunk is not None:
        handles.append(trunk.register_forward_hook(lambda *_: go(live, "loss", "loss")))
    for parameter in named_trainable(model).values():
        handles.append(parameter.register_post_accumulate_grad_hook(lambda p: taken(p, live, at_once)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def taken(parameter: Tensor, live: Live, at_once: bool) -> None:
    """A gradient is there; ``at_once``, the optimizer uses it up."""
    if at_once:
        parameter.grad = None
    elif parameter.grad is not None:
        live.rename(parameter.grad, "gradients")


def stands(model: nn.Module, path: str) -> nn.Module:
    """The module at a path of the bare model: the adapter that stands there, if one does."""
    return dict(walk(model))[path]


def marks(kept: Sequence[int]) -> list[str]:
    """The segment of each block's backward: a run's first and last have one of their own."""
    names = []
    for run, count in enumerate(kept):
        names += [f"block {run}.{0 if i == 0 else 2 if i == count - 1 else 1}" for i in range(count)]
    return names


def go(live: Live, segment: str, tag: str) -> None:
    live.segment, live.tag = segment, tag


def in_block(block: nn.Module, segment: str, live: Live) -> list[Any]:
    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        y = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else None
        if live.segment in FORWARD and isinstance(y, Tensor) and y.requires_grad:
            y.register_hook(lambda grad: go(live, segment, "workspace"))

    return [block.register_forward_hook(leave)]


def evaluated(bare: Bare, parts: Parts, lengths: Sequence[int], targets: int) -> Found:
    """The held-out loss of a batch."""
    live = Live(resting(bare.model))
    batch = (pack if bare.packed else pad)(texts(lengths, targets))
    with Precision(parts.precision, parts.device).autocast(), evaluating(bare.model), bare.mode, live:
        live.segment, live.tag = "evaluation", "evaluation"
        assemble.loss(parts.config)(bare.model, on(batch, parts.device))
    return found(live)


def generated(bare: Bare, parts: Parts, lengths: Sequence[int], new: int) -> Found:
    """A batch of prompts read, and the last of the new tokens."""
    live, width = Live(resting(bare.model)), max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    with Precision(parts.precision, parts.device).autocast(), evaluating(bare.model), bare.mode, live:
        live.segment, live.tag = "generation", "evaluation"
        ids = ids.to(parts.device)
        seen = torch.ones(len(lengths), width, dtype=torch.int64, device=parts.device)
        cache = DynamicCache(config=bare.model.config)
        read(bare.model, ids, seen, cache)
        if new == 1:
            return found(live)
        for layer in getattr(cache, "layers", ()):
            lengthen(layer, new - 2)
        seen = torch.ones(len(lengths), width + new - 1, dtype=torch.int64, device=parts.device)
        read(bare.model, ids[:, -1:], seen, cache)
    return found(live)


def read(model: Any, ids: Tensor, seen: Tensor, cache: DynamicCache) -> None:
    takes = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {"cache" if "cache" in takes else "past_key_values": cache}
    if "logits_to_keep" in takes:
        more["logits_to_keep"] = 1
    model(ids, attention_mask=seen, use_cache=True, **more)


def lengthen(layer: Any, more: int) -> None:
    """A layer of the cache with ``more`` further tokens in it."""
    for name in ("keys", "values"):
        there = getattr(layer, name, None)
        if isinstance(there, Tensor):
            setattr(layer, name, there.new_empty(*there.shape[:2], there.shape[2] + more, there.shape[3]))
