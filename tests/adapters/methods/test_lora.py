"""LoRA against its equation in plain autograd, on every kind of site."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lora_sites import (
    IN,
    OUT,
    R,
    bias_of,
    check_against_equation,
    equation,
    lora,
    nf4,
    wrap,
    x_of,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters import LoRA, dense_weight
from lowrank.keys import Clock, key


@pytest.mark.parametrize("shape", [(5, IN), (2, 5, IN), (2, 3, 5, IN), (IN,)], ids=str)
def test_output_and_every_gradient_are_the_equations(base: nn.Module, shape: tuple[int, ...]) -> None:
    check_against_equation(wrap(base).double(), x_of(*shape))


def test_the_input_may_lie_in_memory_as_it_likes(base: nn.Module) -> None:
    if isinstance(base, Conv1D):
        pytest.skip("transformers' Conv1D itself takes no such input")
    wrapped = wrap(base, dropout=0.3, clock=Clock(1)).double()
    lora(wrapped).clock.set(1, 0)
    flat, batched = x_of(IN, 6), x_of(4, 3, IN)
    for x in (flat.detach().T, batched.detach().transpose(0, 1), x_of(6, 2 * IN).detach()[:, ::2]):
        assert not x.is_contiguous()
        actual, expected = (wrapped(one.requires_grad_()) for one in (x.clone().detach(), x.contiguous()))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(wrapped(x.detach().requires_grad_()), expected, rtol=0, atol=1e-12)


def test_finite_differences_agree(base: nn.Module) -> None:
    wrapped = wrap(base).double()
    x = x_of(4, IN)

    def call(x: Tensor, *_: Tensor) -> Tensor:
        return wrapped(x)

    assert torch.autograd.gradcheck(call, (x, lora(wrapped).A, lora(wrapped).B), fast_mode=True)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 5.0 / R), (True, 5.0 / math.sqrt(R))])
def test_the_scale_is_alpha_over_r_or_over_its_root(rslora: bool, scale: float) -> None:
    wrapped = wrap(nn.Linear(IN, OUT), alpha=5.0, rslora=rslora)
    assert lora(wrapped).scale == pytest.approx(scale)
    check_against_equation(wrapped.double(), x_of(2, 5, IN))


def test_alpha_is_16_whatever_r_and_shapes_are_those_of_the_paper() -> None:
    for r in (1, 4, 16):
        adapter = LoRA(nn.Linear(IN, OUT), generator=key(0), r=r)
        assert (adapter.A.shape, adapter.B.shape, adapter.scale) == ((r, IN), (OUT, r), 16 / r)
        assert adapter.A.dtype == adapter.B.dtype == torch.float32
        assert not adapter.B.any()
        assert adapter.A.abs().max() <= 1 / math.sqrt(IN)


def test_an_embedding_looks_its_update_up() -> None:
    table = nn.Embedding(20, OUT).requires_grad_(False)
    wrapped = wrap(table, alpha=2.0, dropout=0.5).double().train()
    ids = torch.tensor([[3, 3, 7], [0, 19, 3]])
    A, B = (p.detach().clone().requires_grad_() for p in (lora(wrapped).A, lora(wrapped).B))
    one_hot = F.one_hot(ids, 20).double()
    expected = F.linear(one_hot, dense_weight(table)) + 2.0 / R * F.linear(F.linear(one_hot, A), B)
    actual = wrapped(ids)
    grad = torch.randn(expected.shape, generator=key(0, "grad"), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, [A, B], grad)
    found = torch.autograd.grad(actual, [lora(wrapped).A, lora(wrapped).B], grad)
    for one, other in zip((actual, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_without_a_gradient_to_x_the_parameters_gradients_are_the_same(base: nn.Module) -> None:
    wrapped = wrap(base).double()
    x = x_of(2, 5, IN)
    with_x = torch.autograd.grad(wrapped(x).square().sum(), [lora(wrapped).A, lora(wrapped).B])
    without = torch.autograd.grad(wrapped(x.detach()).square().sum(), [lora(wrapped).A, lora(wrapped).B])
    assert all(torch.equal(one, other) for one, other in zip(with_x, without, strict=True))


def test_autocast_computes_in_bf16_and_keeps_fp32_parameters_and_gradients(base: nn.Module) -> None:
    wrapped = wrap(base)
    x = x_of(2, 5, IN, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wrapped(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert {p.dtype for p in lora(wrapped).parameters()} == {torch.float32}
    assert {p.grad.dtype for p in lora(wrapped).parameters() if p.grad is not None} == {torch.float32}
    leaves = [x, lora(wrapped).A, lora(wrapped).B]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    equation(wrapped.double(), *exact).square().sum().backward()
    for one, other in zip(leaves, exact, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert float((one.grad - other.grad).norm() / other.grad.norm()) < 0.02


def test_the_merged_weight_is_the_wrapped_call(base: nn.Module) -> None:
    wrapped = wrap(base, alpha=5.0).double()
    x = x_of(2, 5, IN).detach()
    weight, bias = lora(wrapped).merged(dense_weight(base).double(), bias_of(base))
    torch.testing.assert_close(F.linear(x, weight, bias), wrapped(x), rtol=0, atol=1e-12)


def test_an_nf4_base_with_a_compute_dtype_of_its_own_returns_its_inputs() -> None:
    wrapped = wrap(nf4(bias=True, compute_dtype=torch.bfloat16))
    x = x_of(2, 5, IN, dtype=torch.float32)
    y = wrapped(x)
    y.sum().backward()
    exact = equation(wrapped, x, lora(wrapped).A, lora(wrapped).B).detach()
    assert y.dtype == torch.float32
    assert float((y.detach() - exact).norm() / exact.norm()) < 0.01


def test_a_base_that_trains_too_gets_its_own_gradient() -> None:
    base = nn.Linear(IN, OUT).double()
    wrapped, x = wrap(base).double(), x_of(2, 5, IN)
    found = torch.autograd.grad(wrapped(x).square().sum(), [base.weight, base.bias])
    plain = equation(wrapped, x, lora(wrapped).A, lora(wrapped).B).square().sum()
    wanted = torch.autograd.grad(plain, [base.weight, base.bias])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_without_gradients_the_call_is_the_same(base: nn.Module) -> None:
    wrapped, x = wrap(base).double(), x_of(2, 5, IN)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(wrapped(x), wrapped(x.clone()))
            torch.testing.assert_close(wrapped(x).clone(), wrapped(x))
    with torch.no_grad():
        without = wrapped(x)
    assert torch.equal(without, wrapped(x).detach())
