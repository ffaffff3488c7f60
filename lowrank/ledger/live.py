"""Bytes that are alive and FLOPs that are spent, counted while code runs on tensors without values.

Under ``Live`` and PyTorch's FakeTensorMode the run's own code computes shapes only; every storage it makes is counted
from when it is made until nobody holds it. What a kernel takes inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
MANY = 2**62  # what a number is taken to be that only values could tell


class Live(TorchDispatchMode):
    """``now`` are the bytes alive by tag, ``most`` those of the moment of each segment when they were most.

    A storage has the tag, and counts for the segment, that is set when it is made.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        """``there``: what lies in memory already, and does not count."""
        super().__init__()
        self.tag, self.segment = "", ""
        self.now: Counter[str] = Counter()
        self.most: dict[str, Counter[str]] = {}
        self.flops: Counter[str] = Counter()  # by segment
        self.held = {tensor.untyped_storage()._cdata: ("", 0) for tensor in there}  # by storage: tag, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = result(func, args, kwargs or {})
        dense = func.namespace == "bitsandbytes" and self.tag != "evaluation"
        with self.within("dequantisation") if dense else nullcontext():
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.meet(tensor.untyped_storage())
        count = flops_of(func)
        if count is not None:
            self.flops[self.segment] += count(*args, **(kwargs or {}), out_val=out)
        return out

    def meet(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.held:
            return
        tag = "recompute" if self.tag == "workspace" and recomputing() else self.tag
        self.held[key] = (tag, size)
        self.now[tag] += size
        weakref.finalize(storage, self.leave, key)
        self.note()

    def leave(self, key: int) -> None:
        tag, size = self.held.pop(key)
        self.now[tag] -= size

    def note(self) -> None:
        most = self.most.get(self.segment)
        if most is None or self.now.total() > most.total():
            self.most[self.segment] = self.now.copy()

    def rename(self, tensor: Tensor, tag: str) -> None:
        """What is found out later to be of another kind: a parameter's gradient."""
        key = tensor.untyped_storage()._cdata
        if key in self.held:
            old, size = self.held[key]
            self.held[key] = (tag, size)
            self.now[old] -= size
            self.now[tag] += size

    @contextmanager
    def within(self, tag: str) -> Iterator[None]:
        before, self.tag = self.tag, tag
        try:
            yield
        finally:
            self.tag = before


def recomputing() -> bool:
    """Whether torch's checkpoint repeats a forward: it then watches what that keeps."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def result(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation returns: of the batch's own tensors, its boundaries and positions, their values. Where PyTorch
    does not know a shape, or only values could tell it, a number is ``MANY``, and a mask keeps everything."""
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    counting = func.overloadpacket is aten.arange and str(kwargs.get("device") or "cpu") == "cpu"
    if counting or (given and not any(isinstance(one, FakeTensor) for one in given)):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if not isinstance(value, torch.Generator)}
    if func is torch.ops.mkldnn._linear_pointwise.binary:
        x, _, weight = args[:3]
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    try:
        return func(*args, **kwargs)
    except DataDependentOutputException:
        return MANY
    except DynamicOutputShapeException:
        if func is aten.index.Tensor:
            return torch.empty_like(args[0])
        raise


def flops_of(func: Any) -> Callable[..., int] | None:
    """How many FLOPs a call of an operation is, as torch's FlopCounterMode counts them; None for one of none."""
    packet = getattr(func, "overloadpacket", None)
    return MORE.get(packet) or flop_registry.get(packet)


def linear(x: Tensor, *others: Any, out_val: Tensor, **_: Any) -> int:
    return 2 * out_val.numel() * x.shape[-1]


def attended(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, whole(q, k), whole(q, v))


def attended_back(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, whole(q, k), whole(q, v))


def whole(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """The shape of keys or values with as many heads as queries have."""
    return (k.shape[0], q.shape[1], *k.shape[2:])


MORE: dict[Any, Callable[..., int]] = {  # operations of CPUs that FlopCounterMode leaves out
    torch.ops.mkldnn._linear_pointwise: linear,
    aten._scaled_dot_product_flash_attention_for_cpu: attended,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attended_back,
}
