"""Decoder blocks compiled in place, each where it stands: parameters, their names and the state dict stay.

``torch.compile`` makes one graph of a block, fused or plain, for any number of tokens, and of its elementwise chains
(norms, rotations, activations, sums) one kernel each. The first training step and the first evaluation compile, which
takes a minute or more: their seconds are those of no other step. Where Python has to decide at a call (a mask's seed
from the clock, documents' lengths on a CPU) a block is several graphs: the same numbers, less gained.
"""

from __future__ import annotations

from torch import nn

from lowrank.adapters.sites import blocks, walk

MODES = ("off", "block")


def compile_blocks(model: nn.Module, backend: str = "inductor") -> str:
    """After ``fuse``; returns the line that tells of it. Nothing is compiled before a block's first call."""
    standing, paths = dict(walk(model)), blocks(model)
    for path in paths:
        standing[path].compile(dynamic=True, backend=backend)
    return f"{len(paths)}/{len(paths)} blocks compiled, in the first step"
