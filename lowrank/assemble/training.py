"""What trains a model that has its adapters, and measures it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank import classes, fast
from lowrank.adapters.inject import named_trainable
from lowrank.assemble.examples import Data
from lowrank.assemble.resolved import Parts
from lowrank.assemble.weights import Loaded
from lowrank.data import chat
from lowrank.evaluate import Evaluator
from lowrank.fast.compile import compile_blocks
from lowrank.fast.loss import chunked, each_chunked
from lowrank.fast.offload import Offload
from lowrank.fast.recompute import recompute
from lowrank.schema import Config, Optim
from lowrank.train import flat, optim
from lowrank.train import precision as precisions
from lowrank.train.flat import Flat
from lowrank.train.in_backward import InBackward
from lowrank.train.loss import target_loss, target_losses
from lowrank.train.update import EachParameter, Update


def quickened(parts: Parts, model: nn.Module) -> str:
    """Puts a model that has its adapters on the fast path, and recomputes, as the configuration says; the line that
    tells of both."""
    loop = parts.config.loop
    path = fast.fuse(model) if loop.fast else "fast path: off (loop.fast=false)"
    again = recompute(model, loop.gradient_checkpointing, Offload(parts.device) if loop.offload else None)
    compiled = compile_blocks(model) if loop.compile == "block" else ""
    return "; ".join(part for part in (path, again, compiled) if part)


def optimizer(settings: Optim, model: nn.Module, *, fast: bool = False) -> torch.optim.Optimizer:
    """Over what trains, by ``optim.groups``; ``fast``: with torch's fused kernel, where it has one."""
    cls = classes.resolve(settings.target, torch.optim.Optimizer, "optim._target_")
    trained = named_trainable(model)
    made = optim.groups(trained, settings.groups, lr=settings.lr, weight_decay=settings.weight_decay)
    kernel = optim.fused(cls, settings.options, trained.values()) if fast else {}
    return cls(made, **kernel, **settings.options)


def updating(config: Config, made: torch.optim.Optimizer, say: Callable[[str], None]) -> Update:
    """How gradients become an update; ``say`` is told where it comes to differ from what that says of itself."""
    if config.optim.in_backward:
        return InBackward(made)
    why = flat.why_not(made) if config.loop.fast else "loop.fast=false"
    return Flat(made, say) if why is None else EachParameter(made, why)


def loss(config: Config) -> Callable[[nn.Module, Any], Tensor]:
    """Summed over a batch's target tokens."""
    return chunked(target_loss) if config.loop.fast else target_loss


def losses(config: Config) -> Callable[[nn.Module, Any], Tensor]:
    """Of each of a batch's target tokens, not summed."""
    return each_chunked(target_losses) if config.loop.fast else target_losses


def evaluator(config: Config, parts: Parts, data: Data, loaded: Loaded) -> Evaluator:
    """``config`` may differ from the parts' own in what is evaluated."""
    return Evaluator(
        parts.tokenizer,
        data.eval,
        config.eval,
        collate=loaded.collate,
        loss=loss(config),
        autocast=precisions.Precision(parts.precision, parts.device).autocast,
        stop=chat.ending(parts.tokenizer, config.data.template)[-1:],
        seed=config.data.seed,
    )
