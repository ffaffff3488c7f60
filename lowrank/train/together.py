"""Several loops, each a run of its own, whose forward and backward are made in one pass.

The parameters that they train are disjoint, so the gradient of Σ_k loss_k / targets_k is each one's own. Everything
else of a step (batches, learning rate, clipping, the finite guard, update, hooks) is the loop's, as when it runs alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank.train.finite import NotFinite
from lowrank.train.loop import Begun, Loop, Made, default_generator_restored
from lowrank.train.prefetch import ahead

# Loops' numbers and a micro-batch of each → the summed loss of each.
Forward = Callable[[Sequence[int], Sequence[Any]], Sequence[Tensor]]


@dataclass(frozen=True)
class Left:
    """A loop that has made its last step: all of them, as many as it was asked for, or as it could."""

    number: int
    error: BaseException | None = None


class Every:
    """Loops as one that a signal stops: ``stop`` set to true stops each of them."""

    def __init__(self, loops: Sequence[Loop]) -> None:
        self.loops = loops

    @property
    def stop(self) -> bool:
        return all(loop.stop for loop in self.loops)

    @stop.setter
    def stop(self, value: bool) -> None:
        for loop in self.loops:
            loop.stop = loop.stop or value


def run(loops: Sequence[Loop], steps: Sequence[int], forward: Forward, say: Callable[[str], None]) -> Iterator[Left]:
    """Makes each loop's steps, until there are as many as ``steps`` says of it, it is stopped or it fails; yields each
    as it leaves, and goes on with the others. ``say`` is told where a pass could not be made together."""
    going = dict(enumerate(loops))
    with ExitStack() as reading:
        for loop in loops:
            reading.enter_context(ahead(loop))
        while going:
            done = [Left(n) for n, loop in going.items() if loop.stop or loop.state.step >= steps[n]]
            for left in done or once(going, forward, say):
                del going[left.number]
                yield left


def once(going: Mapping[int, Loop], forward: Forward, say: Callable[[str], None]) -> list[Left]:
    """One step of each; those that failed in it."""
    started, turn = time.perf_counter(), Turn(dict(going))
    begun = turn.each(lambda n, loop: loop.begin())
    losses = turn.losses(begun, forward, say)
    made = turn.each(lambda n, loop: updated(loop, begun[n], losses[n]))
    seconds = time.perf_counter() - started
    turn.each(lambda n, loop: told(loop, begun[n], made[n], seconds))
    return turn.failed


class Turn:
    """A step's loops, of which one may fail without the others."""

    def __init__(self, going: dict[int, Loop]) -> None:
        self.going, self.failed = going, list[Left]()

    def each(self, do: Callable[[int, Loop], Any]) -> dict[int, Any]:
        """What ``do`` returns for each loop that has not failed."""
        found = {}
        for number, loop in list(self.going.items()):
            try:
                found[number] = do(number, loop)
            except BaseException as error:  # whatever it is, it is this loop's end: the caller raises it in its place
                del self.going[number]
                self.failed.append(Left(number, error))
        return found

    def losses(
        self, begun: Mapping[int, Begun], forward: Forward, say: Callable[[str], None]
    ) -> Mapping[int, Sequence[Tensor]]:
        """Of each loop's micro-batches, its gradients made: in one pass, or where that fails in one for each, in which
        who is at fault fails alone."""
        if not self.going:
            return {}
        try:
            with default_generator_restored():
                return together(self.going, begun, forward)
        except Exception as error:
            lines = str(error).strip().partition("\n")[0]
            say(f"step made one by one, since together it failed ({type(error).__name__}: {lines})")
        for loop in self.going.values():
            loop.update.clear()
        return self.each(lambda n, loop: loop.passes(begun[n]))


def together(going: Mapping[int, Loop], begun: Mapping[int, Begun], forward: Forward) -> dict[int, list[Tensor]]:
    """Forward and backward of every loop's micro-batches, the first of each in one pass, then the second …"""
    losses: dict[int, list[Tensor]] = {number: [] for number in going}
    for index in range(max(len(begun[n].batches) for n in going)):
        now = [n for n in going if index < len(begun[n].batches)]
        for n in now:
            going[n].clock.set(begun[n].step, index)
        found = forward(now, [begun[n].batches[index] for n in now])
        parts = [going[n].precision.scaled(loss / begun[n].targets) for n, loss in zip(now, found, strict=True)]
        torch.stack(parts).sum().backward()
        for n, loss in zip(now, found, strict=True):
            losses[n].append(loss.detach())
    return losses


def updated(loop: Loop, begun: Begun, losses: Sequence[Tensor]) -> Made | None:
    """None where the step is not made: passed over, or to come again. Raises NotFinite where the guard stops it."""
    try:
        return loop.update_by(begun, losses)
    except NotFinite as error:
        loop.skip(error.fault)
        return None


def told(loop: Loop, begun: Begun, made: Made | None, seconds: float) -> None:
    """Counts a step that was made. Its time is all that this turn of the loops took, its tokens are its own."""
    if made is not None:
        loop.tell(loop.count(begun, made, seconds))
