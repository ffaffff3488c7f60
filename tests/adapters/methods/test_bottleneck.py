"""Bottleneck adapters against their equation: behind a layer, and behind a whole block of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sited import check_autocast, check_equation, check_finite_differences, check_starts_as_the_base, start, wrap
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowrank.adapters import Adapted, Bottleneck, NotMergeable
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import plan
from lowrank.errors import ConfigError
from lowrank.keys import key

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "relu": lambda x: x.clamp_min(0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
}


def added(h: Tensor, p: dict[str, Tensor], activation: str = "gelu") -> Tensor:
    return h + F.linear(ACTIVATIONS[activation](F.linear(h, p["down"], p["down_bias"])), p["up"], p["up_bias"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_every_gradient_are_the_equations(base: nn.Module, activation: str) -> None:
    def equation(x: Tensor, W: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> Tensor:
        return added(F.linear(x, W, b), p, activation)

    wrapped = wrap(base, Bottleneck, size=3, activation=activation)
    check_equation(wrapped, equation)
    check_finite_differences(wrapped)


def test_it_starts_as_the_base_and_follows_autocast(base: nn.Module) -> None:
    check_starts_as_the_base(base, Bottleneck, size=3)
    check_autocast(base, Bottleneck, size=3)


class Block(nn.Module):
    """A block as models have them: hidden states alone, or first in a tuple."""

    hidden_size = 6

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.inner, self.returns = nn.Linear(6, 6), returns

    def forward(self, hidden_states: Tensor, *, mask: Tensor) -> Any:
        out = hidden_states + mask * self.inner(hidden_states)
        return out if self.returns == "tensor" else (out, "cache", None)


@pytest.mark.parametrize("returns", ["tensor", "tuple"])
def test_a_blocks_hidden_states_pass_through_it_and_the_rest_is_left_alone(returns: str) -> None:
    block = Block(returns).double()
    wrapped = wrap(block, Bottleneck, size=3)
    x, mask = torch.randn(2, 5, 6, dtype=torch.float64), torch.rand(2, 5, 1, dtype=torch.float64)
    found, plain = wrapped(x, mask=mask), block(x, mask=mask)
    if returns == "tuple":
        assert found[1:] == ("cache", None)
        found, plain = found[0], plain[0]
    expected = added(plain, dict(wrapped.adapter.named_parameters()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def on_blocks(model: Any) -> Any:
    """Away from its start, behind every block."""
    apply(model, plan(model, {"blocks": partial(Bottleneck, size=4)}))
    for name, parameter in named_trainable(model).items():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=key(1, name)))
    return model


def test_each_block_of_a_model_has_one_of_the_hidden_width(model: Any) -> None:
    wrapped = [m for m in on_blocks(model).modules() if isinstance(m, Adapted)]
    assert len(wrapped) == 2
    assert {m.adapter.get_parameter("up").shape for m in wrapped} == {(32, 4)}


def test_checkpointed_blocks_give_the_same_gradients(model: Any, tokens: Tensor) -> None:
    on_blocks(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    calls: list[str] = []
    last = [module for module in model.modules() if "MLP" in type(module).__name__][-1]
    last.register_forward_pre_hook(lambda *_: calls.append("mlp"))

    def gradients() -> tuple[Tensor, ...]:
        loss = model(input_ids=tokens).logits.square().mean()
        return torch.autograd.grad(loss, list(named_trainable(model).values()))

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert all(torch.equal(one, other) for one, other in zip(gradients(), plain, strict=True))
    assert len(calls) == 1 + 2  # computed again in the second backward


def test_generation_with_a_cache_is_generation_without(model: Any, tokens: Tensor) -> None:
    on_blocks(model)
    bare = copy.deepcopy(model)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    cached = model.generate(tokens, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, bare.generate(tokens, attention_mask=mask, use_cache=False, **options))


def test_houlsbys_and_pfeiffers_places_are_targets(llama: LlamaForCausalLM) -> None:
    houlsby = plan(llama, dict.fromkeys(["*.o_proj", "*.down_proj"], Bottleneck))
    pfeiffer = plan(llama, {"*.down_proj": Bottleneck})
    assert (len(houlsby.rows), len(pfeiffer.rows)) == (4, 2)
    assert {row.parameters for row in houlsby.rows} == {2 * 64 * 32 + 64 + 32}


def test_it_cannot_be_merged() -> None:
    layer = nn.Linear(16, 12)
    with pytest.raises(NotMergeable):
        start(layer, Bottleneck).adapter.merged(layer.weight, layer.bias)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": 0}, "adapter.size: 0 is not allowed; a positive integer."),
        (
            {"activation": "gleu"},
            "adapter.activation: 'gleu' is not allowed; one of gelu, relu, silu, tanh. Did you mean 'gelu'?",
        ),
    ],
)
def test_options_out_of_range_are_refused(options: Any, sentence: str, llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(llama, {"blocks": partial(Bottleneck, **options)})
    assert str(refused.value) == sentence
