"""The next step's batches, made in a thread while a step runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Batches(Protocol):
    def at(self, step: int) -> Sequence[Any]: ...


class Reader(Protocol):
    """What runs steps: see ``lowrank.train.loop.Loop``."""

    batches: Any
    device: torch.device


class Ahead:
    """The same batches. They are a pure function of the step: neither in which thread they are made matters, nor
    whether they are asked for, nor how often."""

    def __init__(self, batches: Batches, thread: Executor, *, pin: bool) -> None:
        self.batches, self.thread, self.pin = batches, thread, pin
        self.made: dict[int, Future[Sequence[Any]]] = {}

    def at(self, step: int) -> Sequence[Any]:
        """Raises what making them has raised, with the thread's traceback."""
        self.made = {n: self.made.get(n) or self.thread.submit(self.make, n) for n in (step, step + 1)}
        return self.made[step].result()

    def make(self, step: int) -> Sequence[Any]:
        made = self.batches.at(step)
        return [batch.pinned() for batch in made] if self.pin else made


@contextmanager
def ahead(loop: Reader) -> Iterator[None]:
    """Inside, the loop's batches are made a step ahead, for CUDA in memory that it copies from by itself. The thread
    ends with what is inside."""
    plain, thread = loop.batches, ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    loop.batches = Ahead(plain, thread, pin=loop.device.type == "cuda")
    try:
        yield
    finally:
        loop.batches = plain
        thread.shutdown(cancel_futures=True)
