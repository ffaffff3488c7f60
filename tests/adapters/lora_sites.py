"""Single sites with a LoRA on them, and LoRA's equation in plain operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters import Adapted, LoRA, dense_weight
from lowrank.keys import Clock, key
from lowrank.quant.nf4 import NF4Linear

IN, OUT, R = 16, 12, 3


class OwnForward(nn.Linear):
    """A subclass as remote code has them."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class KeepsItsOutput(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        self.kept = super().forward(input)
        return self.kept


def nf4(bias: bool, **options: Any) -> NF4Linear:
    dense = nn.Linear(IN, OUT, bias=bias)
    return NF4Linear.from_dense(dense.weight, dense.bias, double=True, **options)


BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, IN),
    "nf4": lambda: nf4(bias=True),
    "nf4 without bias": lambda: nf4(bias=False),
    "subclass": lambda: OwnForward(IN, OUT),
    "subclass that keeps its output": lambda: KeepsItsOutput(IN, OUT),
}


def wrap(base: nn.Module, *, clock: Clock | None = None, **options: Any) -> Adapted:
    """``base`` with a LoRA whose B is not zero, so that every term of the equation counts."""
    adapter = LoRA(base, generator=key(0, "A"), r=R, **options)
    adapter.B.data.normal_(generator=key(0, "B"))
    adapter.clock, adapter.group = clock or Clock(), "parent:16"
    return Adapted(base, adapter, options)


def x_of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=key(0, "x"), dtype=torch.float64).to(dtype).requires_grad_()


def equation(wrapped: Adapted, x: Tensor, A: Tensor, B: Tensor, kept: Tensor | float = 1.0) -> Tensor:
    """W x + b + s·B(A (kept ∘ x)), plainly."""
    base = wrapped.base
    y = F.linear(x, dense_weight(base).to(x.dtype), bias_of(base))
    return y + lora(wrapped).scale * F.linear(F.linear(x * kept, A), B)


def lora(wrapped: nn.Module) -> LoRA:
    adapter = wrapped.adapter
    assert isinstance(adapter, LoRA)
    return adapter


def bias_of(base: nn.Module) -> Tensor | None:
    bias = getattr(base, "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    return bias


def check_against_equation(wrapped: Adapted, x: Tensor, kept: Tensor | float = 1.0, bound: float = 1e-12) -> None:
    A, B = (p.detach().clone().requires_grad_() for p in (lora(wrapped).A, lora(wrapped).B))
    plain_x = x.detach().clone().requires_grad_()
    expected, actual = equation(wrapped, plain_x, A, B, kept), wrapped(x)
    grad = torch.randn(expected.shape, generator=key(0, "grad"), dtype=torch.float64).to(expected.dtype)
    wanted = torch.autograd.grad(expected, [plain_x, A, B], grad)
    found = torch.autograd.grad(actual, [x, lora(wrapped).A, lora(wrapped).B], grad)
    for one, other in zip((actual, *found), (expected, *wanted), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=bound * float(other.detach().abs().max()))


def saved_storages(call: Callable[[], Any]) -> dict[int, Tensor]:
    """What autograd keeps for backward during ``call``, by storage."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()
    del kept
    return saved
