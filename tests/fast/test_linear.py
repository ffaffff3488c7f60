"""oneDNN's product in a frozen layer: the plain layer's numbers, gradients, names and modules."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lowrank.adapters import LoRA
from lowrank.adapters.inject import apply, named_trainable, remove
from lowrank.adapters.merge import merge
from lowrank.adapters.plan import plan
from lowrank.fast import linear
from lowrank.keys import key
from lowrank.quant.nf4 import NF4Linear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this PyTorch has no oneDNN",
)


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MKL would be the better choice too: the numbers are under test, not the choice."""
    monkeypatch.setattr(linear, "cannot", lambda: None)


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    dense, conv = nn.Linear(64, 96), Conv1D(96, 64)
    nf4 = NF4Linear.from_dense(torch.randn(96, 64), torch.randn(96), double=True)
    return [module.requires_grad_(False) for module in (dense, conv, nf4, nn.Linear(64, 96, bias=False))]


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64)], ids=str)
@pytest.mark.parametrize("index", range(4), ids=["linear", "conv1d", "nf4", "no bias"])
def test_outputs_and_gradients_are_the_plain_layers(index: int, shape: tuple[int, ...]) -> None:
    layer = nn.Sequential(layers()[index])
    x = torch.randn(shape, generator=key(0, "x"))
    wanted, fused = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = layer(wanted)
    weights = torch.randn(expected.shape, generator=key(0, "g"))
    (expected * weights).sum().backward()
    linear.fuse(layer)
    actual = layer(fused)
    (actual * weights).sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.grad, wanted.grad, rtol=1e-5, atol=1e-5)
    linear.unfuse(layer)
    assert torch.equal(layer(x), expected)


def test_wrapped_equals_base_bit_for_bit_when_both_are_fused(llama: LlamaForCausalLM) -> None:
    tokens = torch.arange(12)[None]
    linear.fuse(llama.float())
    bare = llama(input_ids=tokens).logits
    apply(llama, plan(llama, {"all-linear": partial(LoRA, r=4)}))
    assert torch.equal(llama(input_ids=tokens).logits, bare)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_gradients_and_merging_agree_with_the_plain_path(name: str, request: pytest.FixtureRequest) -> None:
    model: LlamaForCausalLM | GPT2LMHeadModel = request.getfixturevalue(name).float().eval()
    tokens = torch.arange(12)[None]
    apply(model, plan(model, {"all-linear": partial(LoRA, r=4)}))
    for path, parameter in named_trainable(model).items():
        parameter.data.normal_(0, 0.1, generator=key(1, path))
    model(input_ids=tokens).logits.square().mean().backward()
    plain = {path: p.grad.clone() for path, p in named_trainable(model).items() if p.grad is not None}
    model.zero_grad()
    linear.fuse(model)
    logits = model(input_ids=tokens).logits
    logits.square().mean().backward()
    for path, parameter in named_trainable(model).items():
        torch.testing.assert_close(parameter.grad, plain[path], rtol=1e-4, atol=1e-5)
    merged, _ = merge(model)
    torch.testing.assert_close(merged(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # the merged model computes with its own weights
        for parameter in merged.parameters():
            parameter.zero_()
    assert merged(input_ids=tokens).logits.abs().max() == 0
    assert torch.equal(model(input_ids=tokens).logits, logits)
    linear.unfuse(remove(model))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("case", ["trains", "fp64", "autocast"])
def test_what_it_cannot_do_is_the_layers_own(case: str) -> None:
    layer, x = layers()[0], torch.randn(3, 64, generator=key(0, "x"))
    linear.fuse(nn.Sequential(layer))
    match case:
        case "trains":
            layer.requires_grad_(True)
            layer(x).sum().backward()
            assert layer.weight.grad is not None
        case "fp64":
            x = x.double()
            layer.double()
            assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        case "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
