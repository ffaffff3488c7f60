"""How LoRA starts: each initialisation by its paper's properties, and the base that some of them change."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lora_sites import BASES, IN, OUT, check_against_equation, nf4, wrap, x_of
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lowrank.adapters import Adapted, LoRA, dense_weight
from lowrank.adapters.inject import apply, current_plan, named_trainable
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import adapted
from lowrank.classes import check_adapter
from lowrank.errors import ConfigError
from lowrank.keys import key
from lowrank.quant.convert import quantize
from lowrank.quant.nf4 import NF4Linear

DRAWN, TAKEN = ("default", "gaussian", "orthogonal", "zeros"), ("pissa", "olora", "loftq")
R = 4
DENSE: dict[str, Callable[[], nn.Module]] = {
    **{name: BASES[name] for name in ("linear", "linear without bias", "conv1d", "subclass")},
    "embedding": lambda: nn.Embedding(20, OUT),
}


def started(base: nn.Module, init: str, **options: Any) -> LoRA:
    return LoRA(base, generator=key(0, "A"), **{"r": R, "alpha": 6.0, **options}, init=init)


def on(base: nn.Module, init: str, **options: Any) -> Adapted:
    adapter = started(base, init, **options)
    return Adapted(adapter.rebased(base), adapter, {}, (base,))


def update(adapter: LoRA) -> Tensor:
    """s·B A (out, in) in fp64."""
    return adapter.scale * adapter.B.detach().double() @ adapter.A.detach().double()


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits
    return found


@pytest.mark.parametrize("init", ["default", "gaussian", "zeros"])
def test_one_factor_is_zero_and_the_other_is_drawn_as_named(init: str) -> None:
    adapter = started(nn.Linear(4000, 300), init)
    A, B = adapter.A.detach(), adapter.B.detach()
    drawn, zero = (B, A) if init == "zeros" else (A, B)
    deviation = {"default": 1 / math.sqrt(3 * 4000), "gaussian": 1 / R, "zeros": 1 / math.sqrt(R)}[init]
    assert not zero.any()
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.05)
    assert abs(float(drawn.mean())) < 0.1 * deviation
    assert adapter.identity_at_start is True


def test_orthogonal_factors_are_both_drawn_and_cancel() -> None:
    adapter = started(nn.Linear(4000, 300), "orthogonal")
    assert float(adapter.A.detach().norm(dim=1).min()) > 1
    assert float(adapter.B.detach().norm(dim=0).min()) > 0.1
    assert float(update(adapter).norm() / (adapter.A.norm() * adapter.B.norm()).detach()) < 1e-6
    assert adapter.identity_at_start == "rounding"


@pytest.mark.parametrize("kind", DENSE)
def test_pissa_takes_the_largest_singular_values_out_of_the_weight_and_shares_them_evenly(kind: str) -> None:
    base = DENSE[kind]()
    wrapped = on(base, "pissa")
    adapter, values = wrapped.adapter, torch.linalg.svdvals(dense_weight(base).detach().double())
    assert isinstance(adapter, LoRA)
    left = torch.linalg.svdvals(dense_weight(wrapped.base).detach().double())
    torch.testing.assert_close(left[: len(values) - R], values[R:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(update(adapter))[:R], values[:R], rtol=1e-5, atol=0)
    for gram in (adapter.A @ adapter.A.T, adapter.B.T @ adapter.B):
        torch.testing.assert_close(gram.detach().double() * adapter.scale, values[:R].diag(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", DENSE)
def test_olora_takes_an_orthonormal_basis_of_the_first_columns(kind: str) -> None:
    base = DENSE[kind]()
    weight, adapter = dense_weight(base).detach().double(), started(base, "olora")
    A, B = adapter.A.detach().double(), adapter.B.detach().double()
    torch.testing.assert_close(B.T @ B, torch.eye(R, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(B @ A[:, :R], weight[:, :R], rtol=0, atol=1e-5)
    torch.testing.assert_close(A, B.T @ weight, rtol=0, atol=1e-5)
    assert not A[:, :R].tril(-1).any()


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", DENSE)
def test_base_and_update_together_are_the_weight_and_the_call_follows_the_equation(kind: str, init: str) -> None:
    base = DENSE[kind]()
    wrapped = on(base, init)
    assert isinstance(wrapped.adapter, LoRA)
    assert (type(wrapped.base), wrapped.adapter.identity_at_start) == (type(base), "rounding")
    together = dense_weight(wrapped.base).double() + update(wrapped.adapter)
    torch.testing.assert_close(together, dense_weight(base).double(), rtol=0, atol=2e-6)
    if kind != "embedding":
        check_against_equation(wrapped.double(), x_of(2, 5, IN))


@pytest.mark.parametrize("init", [*DRAWN, "pissa", "olora"])
def test_a_model_starts_where_its_base_was(init: str, model: nn.Module, tokens: Tensor) -> None:
    before = logits(model, tokens)
    apply(model, plan(model, {"all-linear": partial(LoRA, r=R, init=init), "embedding": partial(LoRA, init=init)}))
    promised = {module.adapter.identity_at_start for _, module in adapted(model)}
    assert promised == {"rounding" if init in ("orthogonal", *TAKEN) else True}
    if promised == {True}:
        assert torch.equal(logits(model, tokens), before)
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_over_nf4_the_rest_is_quantised_anew_and_nothing_is_promised(init: str) -> None:
    base = nf4(bias=True)
    wrapped = on(base, init)
    assert isinstance(wrapped.adapter, LoRA)
    assert isinstance(wrapped.base, NF4Linear)
    rest = (base.dequantize().double() - update(wrapped.adapter)).float()
    again = NF4Linear.from_dense(rest, None, double=True).dequantize()
    torch.testing.assert_close(wrapped.base.dequantize(), again, rtol=0, atol=1e-5)
    assert wrapped.adapter.identity_at_start is False
    assert torch.equal(wrapped.base.get_parameter("bias"), base.get_parameter("bias"))


def quantisation_error(held: NF4Linear, weight: Tensor, added: Tensor | float = 0.0) -> float:
    return float((held.dequantize().double() + added - weight).norm() / weight.norm())


@pytest.mark.parametrize("make", [lambda: nn.Linear(96, 64), lambda: Conv1D(64, 96)], ids=["linear", "conv1d"])
def test_loftq_quantises_with_less_error_than_nf4_alone_and_than_nf4_with_the_best_adapter(make: Any) -> None:
    base = make()
    weight = dense_weight(base).detach()
    wrapped = on(base, "loftq", r=8)
    assert isinstance(wrapped.adapter, LoRA)
    assert isinstance(wrapped.base, NF4Linear)
    plain = NF4Linear.from_dense(weight, None, double=True)
    U, S, Vh = torch.linalg.svd(weight.double() - plain.dequantize().double())
    best = (U[:, :8] * S[:8]) @ Vh[:8]
    loftq = quantisation_error(wrapped.base, weight.double(), update(wrapped.adapter))
    assert loftq < quantisation_error(plain, weight.double(), best) < quantisation_error(plain, weight.double())
    error = torch.linalg.svdvals(weight.double() - wrapped.base.dequantize().double())
    torch.testing.assert_close(torch.linalg.svdvals(update(wrapped.adapter))[:8], error[:8], rtol=1e-4, atol=1e-5)
    check_against_equation(wrapped.double(), x_of(5, 96))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_changed_base_keeps_its_dtype_and_what_trains_is_fp32(dtype: torch.dtype) -> None:
    wrapped = on(nn.Linear(IN, OUT).to(dtype), "pissa")
    assert {p.dtype for p in wrapped.base.parameters()} == {dtype}
    assert {t.dtype for t in wrapped.adapter.state_dict().values()} == {torch.float32}


def test_what_was_taken_out_stays_while_the_factors_train() -> None:
    wrapped = on(nn.Linear(IN, OUT), "pissa")
    first = copy.deepcopy(wrapped.adapter.state_dict())
    assert torch.equal(first["A"], first["A0"])
    torch.optim.SGD(wrapped.adapter.parameters(), lr=1.0).zero_grad()
    wrapped(x_of(5, IN, dtype=torch.float32)).square().sum().backward()
    torch.optim.SGD(wrapped.adapter.parameters(), lr=1.0).step()
    after = wrapped.adapter.state_dict()
    assert torch.equal(after["A0"], first["A0"])
    assert not torch.equal(after["A"], first["A"])


def test_zeros_moves_a_first_as_the_default_moves_b() -> None:
    for init, moves, stays in (("zeros", "A", "B"), ("default", "B", "A")):
        wrapped = on(nn.Linear(IN, OUT), init)
        wrapped(x_of(5, IN, dtype=torch.float32)).square().sum().backward()
        gradients = {name: p.grad.any() for name, p in wrapped.adapter.named_parameters() if p.grad is not None}
        assert gradients == {moves: True, stays: False}


def test_with_freeze_a_b_alone_trains_and_its_gradient_is_the_same(base: nn.Module, llama: LlamaForCausalLM) -> None:
    x, found = x_of(2, 5, IN), []
    for freeze_a in (False, True):
        wrapped = wrap(base, freeze_a=freeze_a).double()
        wrapped(x).square().sum().backward()
        found.append(wrapped.adapter.get_parameter("B").grad)
        assert (wrapped.adapter.get_parameter("A").grad is None) == freeze_a
    assert torch.equal(found[0], found[1])
    made = plan(llama, {"all-linear": partial(LoRA, r=R, freeze_a=True)})
    assert {name.rpartition(".")[2] for name in named_trainable(apply(llama, made))} == {"B"}
    assert sum(p.numel() for p in named_trainable(llama).values()) == made.trainable_parameters
    assert current_plan(llama) == made


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init": "pisa"}, f"init: 'pisa' is not allowed; one of {', '.join((*DRAWN, *TAKEN))}. Did you mean 'pissa'?"),
        ({"init": True}, "init: true is not allowed; one of"),
        ({"init": "orthogonal", "r": 3}, "r: 3 is not allowed with init=orthogonal; an even number."),
        ({"init": "pissa", "r": 17}, "r: 17 is not allowed with init=pissa; at most 16 on a layer of 16×32."),
        ({"init": "zeros", "freeze_a": True}, "freeze_a: true is not allowed with init=zeros; A would stay zero"),
        ({"freeze_a": 1}, "freeze_a: 1 is not allowed; true or false."),
    ],
)
def test_a_start_that_cannot_be_is_refused_before_anything_changes(
    options: dict[str, Any], said: str, llama: LlamaForCausalLM
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(llama, {"k_proj": partial(LoRA, **options)})
    assert str(caught.value).startswith(f"adapter.{said}")


@pytest.mark.parametrize(
    ("target", "make", "said"),
    [
        ("all-linear", "nf4", "init: loftq quantises the layer itself, and here it is quantised already; quant=none."),
        ("embedding", "llama", "init: loftq quantises nn.Linear and Conv1D layers; this is Embedding."),
    ],
)
def test_loftq_goes_on_dense_layers_alone(target: str, make: str, said: str, make_llama: Any) -> None:
    model = quantize(make_llama()) if make == "nf4" else make_llama()
    with pytest.raises(ConfigError) as caught:
        plan(model, {target: partial(LoRA, r=R, init="loftq")})
    assert str(caught.value) == f"adapter.{said}"


def test_the_configurations_check_knows_no_layers_size_and_keeps_a_questions_mark() -> None:
    for init in (*DRAWN, *TAKEN):
        check_adapter("lowrank.adapters.LoRA", "all-linear", {"r": 512, "init": init})
    with pytest.raises(ConfigError, match=r"adapter\.init: 'olra' is not allowed; .* Did you mean 'olora'\?$"):
        check_adapter("lowrank.adapters.LoRA", "all-linear", {"init": "olra"})
