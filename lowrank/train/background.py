"""When a checkpoint is written: before the next step, or beside the steps that follow."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

Files = dict[str, dict[str, Tensor]]  # tensors by file (``adapter``, ``optimizer``) and name


class Writer(Protocol):
    """Carries out one write at a time."""

    def held(self, files: Files) -> Files:
        """The same values, which may be written whenever this writer does."""

    def start(self, write: Callable[[], None]) -> None:
        """Nothing else may be under way."""

    def check(self) -> None:
        """Raises what a write that is over has raised; waits for none."""

    def wait(self) -> None:
        """Until nothing is under way; raises what the write has raised."""

    def close(self) -> BaseException | None:
        """Waits, and returns what ``wait`` would raise: for an ending that has an error of its own."""


class Foreground:
    """Writes at once: the run goes on when it is done."""

    def held(self, files: Files) -> Files:
        return files

    def start(self, write: Callable[[], None]) -> None:
        write()

    def check(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def close(self) -> BaseException | None:
        return None


class Background:
    """Writes from a copy in a thread, which the interpreter waits for when it ends in any ordinary way."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.copies: Files = {}  # in the host's memory, used again by every save

    def held(self, files: Files) -> Files:
        """A copy; the memory of the last one is taken for it, so that one must be written by then."""
        self.copies = {
            file: {name: copied(tensor, self.copies.get(file, {}).get(name)) for name, tensor in tensors.items()}
            for file, tensors in files.items()
        }
        return self.copies

    def start(self, write: Callable[[], None]) -> None:
        self.pending = self.thread.submit(write)

    def check(self) -> None:
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> BaseException | None:
        self.thread.shutdown(wait=True)
        pending, self.pending = self.pending, None
        return pending.exception() if pending is not None else None


@torch.no_grad()
def copied(tensor: Tensor, buffer: Tensor | None) -> Tensor:
    """In the host's memory: in ``buffer`` where that has its shape and dtype."""
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
    return buffer.copy_(tensor)
