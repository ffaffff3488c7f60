"""Where a number first ceases to be finite: one pass through a model whose every module is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.train.finite import kind


class Trace:
    """What was found: the first output of a module that was not finite, or else the first module whose backward turned
    finite gradients into such that are not, or which they came to as they are."""

    def __init__(self) -> None:
        self.forward = self.backward = self.arrived = ""

    def __str__(self) -> str:
        if self.forward:
            return f"First not finite: the output of {self.forward}."
        if self.backward:
            return f"First not finite: the gradient that {self.backward} passes back."
        if self.arrived:
            return f"First not finite: the gradient that comes to the output of {self.arrived}."
        return "The output of every module is finite, and so is every gradient that one passes back."


@contextmanager
def tracing(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Trace]:
    """A pass made inside fills the trace. ``modules`` come with the paths that they are to be called by."""
    trace = Trace()
    handles = []
    for path, module in modules:
        calls: list[Call] = []  # those of this module that are under way: one may call itself
        watch = Watch(trace, path or "the model", calls)
        handles += [
            module.register_forward_pre_hook(watch.begin, with_kwargs=True),
            module.register_forward_hook(watch.end),
        ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


class Call:
    """One call of one module: whether the gradients of its outputs have been finite so far."""

    def __init__(self) -> None:
        self.sound = True


class Watch:
    """One module: its outputs are looked at, and the gradients of its outputs and inputs as they come by."""

    def __init__(self, trace: Trace, path: str, calls: list[Call]) -> None:
        self.trace, self.path, self.calls = trace, path, calls

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        call = Call()
        self.calls.append(call)

        def passed_back(grad: Tensor) -> None:
            if call.sound and not self.trace.backward and kind(grad):
                self.trace.backward = self.path

        return marked(args, passed_back), marked(kwargs, passed_back)

    def end(self, module: nn.Module, args: Any, output: Any) -> Any:
        call = self.calls.pop()
        if not self.trace.forward and any(kind(tensor.detach()) for tensor in tensors(output)):
            self.trace.forward = self.path

        def came_in(grad: Tensor) -> None:
            call.sound = call.sound and not kind(grad)
            if not call.sound and not self.trace.arrived:
                self.trace.arrived = self.path

        return marked(output, came_in)


class Mark(torch.autograd.Function):
    """x, and in backward its gradient shown to ``seen``: of this use of x alone, where a tensor's own hook would see
    the sum over all its uses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Callable[[Tensor], None]) -> Tensor:
        ctx.seen = seen
        return x.clone()  # a view could not be added to in place, as an adapter may do

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.seen(grad)
        return grad, None


def marked(value: Any, seen: Callable[[Tensor], None]) -> Any:
    """``value`` with a mark on each tensor that a gradient comes to, in tuples, dicts and transformers' outputs."""
    if isinstance(value, Tensor):
        return Mark.apply(value, seen) if value.requires_grad else value
    if type(value) is tuple:
        return tuple(marked(item, seen) for item in value)
    if type(value) is dict:
        return {name: marked(item, seen) for name, item in value.items()}
    if isinstance(value, dict) and is_dataclass(value):
        return type(value)(**{name: marked(item, seen) for name, item in value.items()})
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
