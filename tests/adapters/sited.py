"""One site with an adapter that has left its start, against the method's equation in plain operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lora_sites import bias_of, x_of
from torch import Tensor, nn

from lowrank.adapters import Adapted, Adapter, dense_weight
from lowrank.adapters.base import shape
from lowrank.keys import key

Equation = Callable[[Tensor, Tensor, Tensor | None, dict[str, Tensor]], Tensor]  # x, W (out, in), b, parameters → y


def start(base: nn.Module, method: type[Adapter], **options: Any) -> Adapted:
    return Adapted(base, method(base, generator=key(0, "start"), **options), options)


def wrap(base: nn.Module, method: type[Adapter], **options: Any) -> Adapted:
    """In fp64, every value away from its start, so that every term of the equation counts."""
    wrapped = start(base, method, **options).double()
    for name, parameter in wrapped.adapter.named_parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=key(1, name), dtype=torch.float64))
    return wrapped


def check_equation(wrapped: Adapted, equation: Equation) -> None:
    """The output, and the gradient of x and of every parameter, are those of the equation, for any shape of x."""
    width = shape(wrapped.base)[1]
    weight, bias = dense_weight(wrapped.base).double(), bias_of(wrapped.base)
    held = dict(wrapped.adapter.named_parameters())
    for x in (x_of(5, width), x_of(2, 3, width), x_of(width)):
        plain = {name: p.detach().clone().requires_grad_() for name, p in held.items()}
        plain_x = x.detach().clone().requires_grad_()
        expected, actual = equation(plain_x, weight, bias, plain), wrapped(x)
        grad = torch.randn(expected.shape, generator=key(0, "grad"), dtype=torch.float64)
        wanted = torch.autograd.grad(expected, [plain_x, *plain.values()], grad)
        found = torch.autograd.grad(actual, [x, *held.values()], grad)
        for one, other in zip((actual, *found), (expected, *wanted), strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11 * float(1 + other.detach().abs().max()))
        assert all(float(g.abs().max()) > 0 for g in found)


def check_finite_differences(wrapped: Adapted) -> None:
    x = x_of(3, shape(wrapped.base)[1])
    leaves = [x, *wrapped.adapter.parameters()]
    assert torch.autograd.gradcheck(lambda *_: wrapped(x), leaves, fast_mode=True)


def check_merged(wrapped: Adapted) -> None:
    """The merged weight and bias are the wrapped call, and merging changes nothing that it was given."""
    x = x_of(2, 5, shape(wrapped.base)[1]).detach()
    weight, bias = dense_weight(wrapped.base).double(), bias_of(wrapped.base)
    before = weight.clone()
    merged, merged_bias = wrapped.adapter.merged(weight, bias)
    assert torch.equal(weight, before)
    assert not torch.allclose(merged, before)
    torch.testing.assert_close(F.linear(x, merged, merged_bias), wrapped(x), rtol=0, atol=1e-11)


def check_factors(wrapped: Adapted) -> None:
    """The adapter adds B A x."""
    found = wrapped.adapter.factors()
    assert found is not None
    x = x_of(2, 5, shape(wrapped.base)[1]).detach()
    added = wrapped(x) - wrapped.base(x)
    torch.testing.assert_close(F.linear(F.linear(x, found[0]), found[1]), added, rtol=0, atol=1e-11)


def check_starts_as_the_base(base: nn.Module, method: type[Adapter], **options: Any) -> None:
    """Bit for bit, in fp32 and bf16 and under autocast; and some parameter gets a gradient there."""
    wrapped = start(base, method, **options)
    assert {p.dtype for p in wrapped.adapter.parameters()} == {torch.float32}
    x = x_of(2, 5, shape(base)[1], dtype=torch.float32)
    assert torch.equal(wrapped(x), base(x))
    wrapped(x).square().sum().backward()
    gradients = [p.grad for p in wrapped.adapter.parameters()]
    assert any(g is not None and g.any() for g in gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wrapped(x), base(x))
        assert wrapped(x).dtype == torch.bfloat16
    wrapped.to(torch.bfloat16)
    half = x.detach().bfloat16()
    assert torch.equal(wrapped(half), base(half))
    assert wrapped(half).dtype == torch.bfloat16


def check_autocast(base: nn.Module, method: type[Adapter], **options: Any) -> None:
    """Away from the start: bf16 out, fp32 parameters and gradients, near the exact ones."""
    wrapped = wrap(base, method, **options)
    x = x_of(4, 5, shape(base)[1])
    parameters = list(wrapped.adapter.parameters())
    exact = torch.autograd.grad(wrapped(x).square().sum(), [x, *parameters])
    wrapped.float()
    x32 = x.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wrapped(x32)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().square().sum(), [x32, *wrapped.adapter.parameters()])
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 0.03
