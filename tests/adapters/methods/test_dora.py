"""DoRA against its equation in plain autograd, with the rows' norms held constant as its paper has them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_sites import IN, OUT, R, bias_of, saved_storages, x_of
from torch import Tensor, nn

from lowrank.adapters import Adapted, DoRA, dense_weight
from lowrank.adapters.inject import adapter_state, apply, current_plan, named_trainable, remove
from lowrank.adapters.merge import merge
from lowrank.adapters.methods.dropout import dropped_positions
from lowrank.adapters.plan import plan
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.errors import ConfigError
from lowrank.keys import Clock, key


def wrap(base: nn.Module, *, clock: Clock | None = None, **options: Any) -> Adapted:
    """``base`` with a DoRA that is away from its start."""
    adapter = DoRA(base, generator=key(0, "A"), r=R, **options)
    adapter.B.data.normal_(generator=key(0, "B"))
    adapter.magnitude.data.mul_(1 + 0.3 * torch.randn(OUT, generator=key(0, "m")))
    adapter.clock, adapter.group = clock or Clock(), "parent:16"
    return Adapted(base, adapter, options)


def dora(wrapped: nn.Module) -> DoRA:
    adapter = wrapped.adapter
    assert isinstance(adapter, DoRA)
    return adapter


def equation(wrapped: Adapted, x: Tensor, A: Tensor, B: Tensor, m: Tensor, kept: Tensor | float = 1.0) -> Tensor:
    """W x + b + (m/n − 1) ∘ W x̃ + m/n ∘ s·B A x̃, with x̃ = kept ∘ x and n = ‖W + s·B A‖ without a gradient."""
    base, s = wrapped.base, dora(wrapped).scale
    W = dense_weight(base).to(x.dtype)
    ratio = m / (W + s * B @ A).norm(dim=1).detach()
    low = F.linear(F.linear(x * kept, A), B)
    return F.linear(x, W, bias_of(base)) + (ratio - 1) * F.linear(x * kept, W) + ratio * s * low


def check_against_equation(wrapped: Adapted, x: Tensor, kept: Tensor | float = 1.0) -> None:
    parameters = list(dora(wrapped).parameters())  # A, B, magnitude
    plain = [p.detach().clone().requires_grad_() for p in (x, *parameters)]
    plain_x, A, B, m = plain
    expected, actual = equation(wrapped, plain_x, A, B, m, kept), wrapped(x)
    grad = torch.randn(expected.shape, generator=key(0, "grad"), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, plain, grad)
    found = torch.autograd.grad(actual, [x, *parameters], grad)
    for one, other in zip((actual, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11 * float(other.detach().abs().max()))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shape", [(5, IN), (2, 5, IN), (IN,)], ids=str)
def test_output_and_every_gradient_are_the_equations(base: nn.Module, shape: tuple[int, ...], rslora: bool) -> None:
    check_against_equation(wrap(base, alpha=5.0, rslora=rslora).double(), x_of(*shape))


def test_what_it_drops_it_drops_for_the_product_with_w_too_and_for_no_other(base: nn.Module) -> None:
    clock = Clock(4)
    clock.set(3, 1)
    wrapped, x = wrap(base, dropout=0.4, clock=clock).double().train(), x_of(2, 5, IN)
    positions = dropped_positions(x.numel(), 0.4, clock.draw("parent:16"), torch.device("cpu"))
    kept = torch.full((x.numel(),), 1 / 0.6, dtype=torch.float64).index_fill(0, positions, 0).view(x.shape)
    assert 0 < int((kept == 0).sum()) < x.numel()
    check_against_equation(wrapped, x, kept)
    check_against_equation(wrapped.eval(), x)


def test_finite_differences_agree_where_the_norm_does_not_come_in(base: nn.Module) -> None:
    wrapped, x = wrap(base).double(), x_of(4, IN)
    assert torch.autograd.gradcheck(lambda x, m: wrapped(x), (x, dora(wrapped).magnitude), fast_mode=True)


def test_an_embedding_is_scaled_by_feature() -> None:
    table = nn.Embedding(20, OUT).requires_grad_(False)
    wrapped, ids = wrap(table, dropout=0.5).double().train(), torch.tensor([[3, 3, 7], [0, 19, 3]])
    parameters = list(dora(wrapped).parameters())
    plain = [p.detach().clone().requires_grad_() for p in parameters]
    one_hot = F.one_hot(ids, 20).double()
    expected, actual = equation(wrapped, one_hot, *plain), wrapped(ids)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, generator=key(0, "grad"), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), plain)
    for one, other in zip(torch.autograd.grad((actual * weights).sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_at_the_start_it_is_its_base_bit_for_bit(base: nn.Module, dtype: torch.dtype) -> None:
    base = base.to(dtype)
    adapter, x = DoRA(base, generator=key(0), r=R), x_of(50, IN, dtype=dtype)
    assert adapter.identity_at_start is True
    assert torch.equal(adapter(base, x), base(x))
    torch.testing.assert_close(adapter.magnitude.detach(), dense_weight(base).float().norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_row_of_zeros_stays_finite(dtype: torch.dtype) -> None:
    base = nn.Linear(IN, OUT).requires_grad_(False)
    base.weight[3] = 0
    wrapped, x = Adapted(base, DoRA(base, generator=key(0), r=R), {}).to(dtype), x_of(5, IN, dtype=dtype)
    y = wrapped(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, base(x))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dora(wrapped).parameters())


def test_the_merged_weight_has_rows_of_the_magnitudes_and_is_the_wrapped_call(base: nn.Module) -> None:
    wrapped, x = wrap(base, alpha=3.0).double(), x_of(2, 5, IN).detach()
    weight, bias = dora(wrapped).merged(dense_weight(base).double(), bias_of(base))
    torch.testing.assert_close(F.linear(x, weight, bias), wrapped(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(weight.norm(dim=1), dora(wrapped).magnitude.abs(), rtol=0, atol=1e-12)
    assert bias is bias_of(base)


def test_nothing_of_the_weights_size_is_kept_for_backward() -> None:
    base = nn.Linear(200, 300).requires_grad_(False)
    adapter, x = DoRA(base, generator=key(0), r=R, dropout=0.3).train(), torch.randn(5, 200)
    own = {p.untyped_storage().data_ptr() for p in (*base.parameters(), *adapter.parameters())}
    saved = [t for pointer, t in saved_storages(lambda: adapter(base, x)).items() if pointer not in own]
    assert max(t.numel() for t in saved) <= 5 * 300


def trained(model: Any) -> Any:
    apply(model, plan(model, {"all-linear": partial(DoRA, r=R), "embedding": partial(DoRA, r=2)}))
    for name, parameter in named_trainable(model).items():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=key(1, name)))
    return model


def test_a_model_with_it_is_saved_merged_and_undone(
    model: Any, make_llama: Any, make_gpt2: Any, tokens: Tensor, tmp_path: Path
) -> None:
    make = make_llama if type(model).__name__.startswith("Llama") else make_gpt2
    with torch.no_grad():
        bare = model(input_ids=tokens).logits
        after = trained(model)(input_ids=tokens).logits
        assert not torch.allclose(after, bare, atol=1e-2)
        save_adapter(model, tmp_path)
        again = load_adapter(make(), tmp_path)
        assert current_plan(again) == current_plan(model)
        assert torch.equal(again(input_ids=tokens).logits, after)
        torch.testing.assert_close(merge(model)[0](input_ids=tokens).logits, after, rtol=0, atol=1e-4)
        assert {name.rpartition(".")[2] for name in adapter_state(model)} == {"A", "B", "magnitude"}
        assert torch.equal(remove(model)(input_ids=tokens).logits, bare)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "adapter.r: 0 is not allowed; a positive integer."),
        ({"dropout": 1.0}, "adapter.dropout: 1.0 is not allowed; a number from 0 up to, but not including, 1."),
        ({"alfa": 1}, "adapter.alfa: unknown key. Did you mean 'alpha'? Allowed: r, alpha, dropout, rslora."),
    ],
)
def test_a_bad_option_is_refused(options: dict[str, Any], said: str, llama: nn.Module) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(llama, {"q_proj": partial(DoRA, **options)})
    assert str(caught.value) == said
