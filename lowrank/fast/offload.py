"""Block inputs on the host between forward and backward.

On CUDA they go to pinned memory on a stream of their own while the next block computes, and come back on it while the
block after theirs is in its backward (as in arXiv 1602.08124). The last block's input, needed at once, stays, and so do
small ones. On a CPU the same moves are plain copies, which is for tests alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SMALL = 1 << 20  # bytes: not worth a copy


@dataclass(eq=False)
class Away:
    """An input that is not on its device."""

    block: int
    host: Tensor
    back: Tensor | None = None  # on its way or there
    arrived: Any = None  # the event that says so


class Offload:
    """Of one model: ``of(number)`` is for the call of the block of that number."""

    def __init__(self, device: torch.device, small: int = SMALL) -> None:
        self.device, self.small, self.blocks = device, small, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.away: WeakValueDictionary[int, Away] = WeakValueDictionary()  # of the last forward; its graph holds them

    def __deepcopy__(self, memo: Any) -> Offload:
        return self  # a stream cannot be copied, and a copied model may share it

    def begin(self, blocks: int) -> None:
        """For a model of so many."""
        self.blocks = blocks

    def of(self, block: int) -> Any:
        """Makes the context in which a block's input is kept."""
        return partial(saved_tensors_hooks, partial(self.leave, block), self.come)

    def leave(self, block: int, x: Tensor) -> Tensor | Away:
        elsewhere = x.device.type != self.device.type or not x.is_floating_point()  # a mask is all blocks' own
        if elsewhere or block == self.blocks - 1 or x.nbytes < self.small:
            return x
        host = torch.empty_like(x, device="cpu", pin_memory=self.stream is not None)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # x is there
            x.record_stream(self.stream)  # and its memory is not given away before it is copied
        with self.beside():
            host.copy_(x, non_blocking=True)
        found = Away(block, host)
        self.away[block] = found
        return found

    def come(self, kept: Tensor | Away) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.fetch(kept)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.arrived)
        before = self.away.get(kept.block - 1)  # its backward is next
        if before is not None:
            self.fetch(before)
        assert kept.back is not None
        x, kept.back = kept.back, None
        return x

    def fetch(self, kept: Away) -> None:
        """Begins the way back, unless it has begun."""
        if kept.back is not None:
            return
        kept.back = torch.empty_like(kept.host, device=self.device)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # its memory is free
            kept.back.record_stream(self.stream)
        with self.beside():
            kept.back.copy_(kept.host, non_blocking=True)
            kept.arrived = self.stream.record_event() if self.stream is not None else None

    def beside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
