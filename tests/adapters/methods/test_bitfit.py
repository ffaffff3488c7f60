"""BitFit: the biases train and nothing else, over a dense and over an NF4 base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lowrank.adapters import BitFit
from lowrank.adapters.inject import apply, named_trainable, remove
from lowrank.adapters.plan import plan
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.errors import ConfigError
from lowrank.keys import key
from lowrank.quant.convert import quantize
from lowrank.quant.nf4 import NF4Linear

RULES: Any = {"*.bias": BitFit}


@pytest.fixture(params=["dense", "nf4"])
def make(request: pytest.FixtureRequest, make_gpt2: Callable[..., GPT2LMHeadModel]) -> Callable[[], Any]:
    return make_gpt2 if request.param == "dense" else lambda: quantize(make_gpt2())


def step(model: Any, tokens: Tensor) -> None:
    optimizer = torch.optim.SGD(named_trainable(model).values(), lr=0.1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def test_every_bias_trains_and_nothing_else_moves(make: Callable[[], Any], tokens: Tensor) -> None:
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply(model, plan(model, RULES))
    step(model, tokens)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    biases = {name for name in before if name.endswith(".bias")}
    assert moved == biases
    assert len(biases) == 2 * 6 + 1
    assert {name for name, p in model.named_parameters() if p.grad is not None} == biases


@pytest.mark.parametrize("name", ["h.0.attn.c_attn", "h.1.mlp.c_proj", "h.0.ln_1", "ln_f"])
def test_a_biass_gradient_is_its_finite_difference(name: str, make: Callable[[], Any], tokens: Tensor) -> None:
    model = make().double()
    apply(model, plan(model, RULES))
    bias = model.transformer.get_submodule(name).bias
    along = torch.randn(bias.shape, generator=key(0, name), dtype=torch.float64)
    weights = torch.randn((*tokens.shape, 64), generator=key(0, "weights"), dtype=torch.float64)

    def value() -> Tensor:
        found: Tensor = (model(input_ids=tokens).logits * weights).sum()
        return found

    slope = float((torch.autograd.grad(value(), bias)[0] * along).sum())
    ends = []
    for move in (1e-6, -2e-6):
        bias.data.add_(along, alpha=move)
        ends.append(float(value().detach()))
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_a_4_bit_layers_bias_gets_the_dense_layers_gradient() -> None:
    dense = torch.nn.Linear(16, 12).double()
    layer = NF4Linear.from_dense(dense.weight, dense.bias, double=True)
    dense.weight.data.copy_(layer.dequantize(torch.float64))
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for module in (dense, layer):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=0, atol=1e-11)


def test_what_was_trained_is_saved_and_loads_on_a_bare_model(
    make: Callable[[], Any], tokens: Tensor, tmp_path: Path
) -> None:
    model = make()
    apply(model, plan(model, RULES))
    step(model, tokens)
    save_adapter(model, tmp_path)
    other = load_adapter(make(), tmp_path)
    with torch.no_grad():
        assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert named_trainable(other).keys() == named_trainable(model).keys()
    assert not any(p.requires_grad for p in remove(other).parameters())


def test_of_what_a_target_names_the_biases_alone_train(gpt2: GPT2LMHeadModel, llama: LlamaForCausalLM) -> None:
    found = plan(gpt2, {"c_attn": BitFit, "ln_1@0": BitFit}).rows
    layers = ["transformer.h.0.ln_1", "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert [row.path for row in found] == [f"{layer}.bias" for layer in layers]
    with pytest.raises(ConfigError, match=r"'q_proj' matches .*q_proj\.weight, but BitFit trains '\*\.bias' alone"):
        plan(llama, {"q_proj": BitFit})


@pytest.mark.parametrize("quantised", [False, True])
def test_a_model_without_biases_is_refused(quantised: bool, llama: LlamaForCausalLM) -> None:
    model = quantize(llama) if quantised else llama
    with pytest.raises(ConfigError) as refused:
        plan(model, RULES)
    sentence = "adapter.targets: '*.bias' matches no parameter of this LlamaForCausalLM. There are: weight."
    assert str(refused.value) == sentence
