"""Faster ways to compute the same: each file one idea, its plain equation beside it.

``fuse`` takes a model that has its adapters and ``unfuse`` gives it back: parameters, their names and the state dict
stay what they are, since all that is set is ``forward`` on instances.
"""

from __future__ import annotations

from torch import nn

from lowrank.fast import block, linear, loss, swiglu


def fuse(model: nn.Module) -> str:
    """What is taken and what is not and why, in a line."""
    parts = [block.fuse(model), linear.fuse(model), loss.describe(model)]
    swiglu.fuse(model)  # of blocks that stay plain, and of all while no gradient is wanted
    return f"fast path: {', '.join(parts)}"


def unfuse(model: nn.Module) -> None:
    """Every module computes by its own class again."""
    block.unfuse(model)  # which remembers what it saw of a block
    linear.unfuse(model)


__all__ = ["block", "fuse", "linear", "loss", "swiglu", "unfuse"]
