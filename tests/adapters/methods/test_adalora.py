"""AdaLoRA's layer: its equation, its gradients, its penalty, what it refuses, and PEFT's layer with the same values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_sites import BASES, IN, OUT, bias_of, x_of
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from lowrank.adapters import AdaLoRA, Adapted, dense_weight
from lowrank.adapters.inject import apply
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import adapted
from lowrank.errors import ConfigError
from lowrank.keys import Clock, key
from lowrank.models.tiny import tiny_gpt2, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]

R = 3


def wrap(base: nn.Module, **options: Any) -> Any:
    """``base`` with an AdaLoRA in fp64 whose every value counts."""
    adapter = AdaLoRA(base, generator=key(0, "start"), init_r=R, target_r=2, **options)
    for name, parameter in adapter.named_parameters():
        parameter.data.normal_(generator=key(0, name))
    adapter.clock, adapter.group = Clock(1), "parent:16"
    adapter.clock.set(1, 0)
    return Adapted(base, adapter, options).double()


def equation(wrapped: Any, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    y = F.linear(x, dense_weight(wrapped.base).to(x.dtype), bias_of(wrapped.base))
    return y + (8.0 / R) * (x @ A.T @ torch.diag(E) @ B.T)


def test_the_call_and_its_gradients_are_the_equation_s(base: nn.Module) -> None:
    wrapped = wrap(base, alpha=8.0).train()
    own = [wrapped.adapter.A, wrapped.adapter.E, wrapped.adapter.B]
    plain = [p.detach().clone().requires_grad_() for p in own]
    x, plain_x = x_of(2, 5, IN), x_of(2, 5, IN)
    actual, expected = wrapped(x), equation(wrapped, plain_x, *plain)
    grad = torch.randn(expected.shape, generator=key(0, "grad"), dtype=torch.float64)
    found = torch.autograd.grad(actual, [x, *own], grad)
    wanted = torch.autograd.grad(expected, [plain_x, *plain], grad)
    for one, other in zip((actual, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * float(other.detach().abs().max()))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_the_finite_differences(dropout: float) -> None:
    wrapped = wrap(BASES["linear"](), dropout=dropout).train()
    inputs = (x_of(3, IN), *wrapped.adapter.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: wrapped(x), inputs)


def test_it_starts_as_the_base_bit_for_bit_with_the_paper_s_gaussians(base: nn.Module) -> None:
    torch.manual_seed(0)
    adapter = AdaLoRA(nn.Linear(300, 200), generator=key(0, "start"))
    assert not adapter.E.any()
    for factor in (adapter.A.detach(), adapter.B.detach()):
        assert abs(float(factor.mean())) < 0.002
        assert 0.019 < float(factor.std()) < 0.021
    x = torch.randn(7, IN)
    with torch.no_grad():
        assert torch.equal(Adapted(base, AdaLoRA(base, generator=key(0)), {})(x), base(x))


def test_what_is_merged_computes_the_same(base: nn.Module) -> None:
    wrapped, x = wrap(base).eval(), x_of(4, IN)
    weight, bias = wrapped.adapter.merged(dense_weight(wrapped.base).double(), bias_of(wrapped.base))
    torch.testing.assert_close(F.linear(x, weight, bias), wrapped(x), rtol=0, atol=1e-12)


def test_the_penalty_is_zero_for_orthonormal_factors_and_else_the_squared_distance_from_them() -> None:
    adapter = wrap(nn.Linear(IN, OUT), orth_weight=0.3).adapter
    A, B = adapter.A.detach(), adapter.B.detach()
    expected = 0.0  # entry by entry
    for i in range(R):
        for j in range(R):
            expected += (float(A[i] @ A[j]) - (i == j)) ** 2 + (float(B[:, i] @ B[:, j]) - (i == j)) ** 2
    assert float(adapter.penalty().detach()) == pytest.approx(0.3 * expected, rel=1e-12)
    adapter.A.data, adapter.B.data = torch.linalg.qr(A.T)[0].T.contiguous(), torch.linalg.qr(B)[0]
    assert float(adapter.penalty().detach()) < 1e-24


def test_descending_the_penalty_makes_the_factors_orthonormal() -> None:
    adapter = AdaLoRA(nn.Linear(IN, OUT), generator=key(0, "start"), init_r=R, target_r=2, orth_weight=0.1)
    optimizer = torch.optim.SGD([adapter.A, adapter.B], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        torch.as_tensor(adapter.penalty()).backward()
        optimizer.step()
    torch.testing.assert_close(adapter.A @ adapter.A.T, torch.eye(R), rtol=0, atol=1e-4)
    torch.testing.assert_close(adapter.B.T @ adapter.B, torch.eye(R), rtol=0, atol=1e-4)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"init_r": 0}, "init_r: 0 is not allowed; a positive integer."),
    ({"init_r": 2.5}, "init_r: 2.5 is not allowed; a positive integer."),
    ({"target_r": 13}, "target_r: 13 is not allowed; at most init_r, which is 12."),
    ({"alpha": 0}, "alpha: 0 is not allowed; a positive number."),
    ({"dropout": 1}, "dropout: 1 is not allowed; a number from 0 up to, but not including, 1."),
    ({"tinit": 200}, "tinit: 200 is not allowed; a fraction of the run, from 0 up to, but not including, 1."),
    ({"tfinal": "a"}, "tfinal: 'a' is not allowed; a fraction of the run, from 0 up to, but not including, 1."),
    ({"tinit": 0.4, "tfinal": 0.6}, "tfinal: 0.6 is not allowed; with tinit 0.4, less than 0.6."),
    ({"delta_t": 0}, "delta_t: 0 is not allowed; a positive integer."),
    ({"beta1": 0}, "beta1: 0 is not allowed; a number between 0 and 1."),
    ({"beta2": 1}, "beta2: 1 is not allowed; a number between 0 and 1."),
    ({"orth_weight": float("inf")}, "orth_weight: inf is not allowed; a number from 0."),
    ({"orth_weight": True}, "orth_weight: true is not allowed; a number from 0."),
]


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[next(iter(reversed(o))) for o, _ in WRONG])
def test_an_option_out_of_its_range_is_refused_in_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=next(iter(reversed(options)))) as refused:
        AdaLoRA(nn.Linear(IN, OUT), generator=key(0), **options)
    assert str(refused.value) == said


def test_steps_between_reallocations_that_do_not_fit_the_run_are_refused() -> None:
    adapters = {"q": AdaLoRA(nn.Linear(IN, OUT), generator=key(0), delta_t=7)}
    assert AdaLoRA.hook(dict(adapters), steps=9).schedule.every == 7
    with pytest.raises(ConfigError) as refused:
        AdaLoRA.hook(dict(adapters), steps=8)
    said = "adapter.delta_t: 7 is not allowed; of this run's 8 steps the ranks change in 1 to 6: at most 6, or null."
    assert str(refused.value) == said


IDS = torch.randint(0, 256, (2, 16), generator=key(0, "ids"))
TARGETS = {
    "llama": (tiny_llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "gpt2": (tiny_gpt2, ["c_attn", "c_fc", "c_proj"]),
}


@pytest.mark.parametrize(("build", "targets"), TARGETS.values(), ids=TARGETS)
def test_logits_and_gradients_are_those_of_peft(build: Callable[[], Any], targets: list[str]) -> None:
    """PEFT divides by r + 1e-5; with alpha to match, both are the same to rounding."""
    base = build().double().requires_grad_(False).eval()
    options = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, target_modules=targets, total_step=10, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(copy.deepcopy(base), options).double().eval()
    mine = partial(AdaLoRA, init_r=4, target_r=2, alpha=6 * 4 / (4 + 1e-5))
    ours = apply(base, plan(base, dict.fromkeys(targets, mine))).double().eval()
    pairs = {}
    for path, module in adapted(ours):
        layer, adapter = theirs.base_model.model.get_submodule(path), module.adapter
        for name, other in (("A", layer.lora_A), ("E", layer.lora_E), ("B", layer.lora_B)):
            own, value = getattr(adapter, name), other["default"]
            own.data.normal_(0, 0.3, generator=key(0, path, name))
            value.data.copy_(own.data.view(value.shape))  # PEFT's E is (r, 1)
            pairs[f"{path}.{name}"] = (own, value)
    logits = [model(input_ids=IDS).logits for model in (ours, theirs)]
    assert (logits[0] - logits[1]).abs().max() <= 1e-12 * logits[1].abs().max()
    for found in logits:
        found.square().mean().backward()
    for name, (own, value) in pairs.items():
        assert own.grad.abs().max() > 0, name
        torch.testing.assert_close(own.grad.view(value.shape), value.grad, rtol=1e-9, atol=1e-14, msg=name)
