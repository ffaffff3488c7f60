"""A base that the start of its adapter has changed: saved and found again, merged, and put back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowrank.adapters import LoRA
from lowrank.adapters.inject import adapter_state, apply, current_plan, named_trainable, remove
from lowrank.adapters.merge import merge
from lowrank.adapters.plan import plan
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.errors import ConfigError
from lowrank.keys import key
from lowrank.quant.convert import quantize

TAKEN, R = ("pissa", "olora", "loftq"), 4


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits
    return found


def bases(make_llama: Callable[..., Any], make_gpt2: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    return {"llama": make_llama, "gpt2": make_gpt2, "nf4": lambda: quantize(make_llama())}


@pytest.mark.parametrize(
    ("init", "kind"), [(i, k) for i in TAKEN for k in ("llama", "gpt2", "nf4") if (i, k) != ("loftq", "nf4")]
)
def test_a_saved_adapter_finds_the_same_base_again_bit_for_bit(
    init: str, kind: str, make_llama: Any, make_gpt2: Any, tokens: Tensor, tmp_path: Path
) -> None:
    make = bases(make_llama, make_gpt2)[kind]
    model = make()
    made = plan(model, {"all-linear": partial(LoRA, r=R, init=init)})
    apply(model, made)
    for name, parameter in named_trainable(model).items():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=key(1, name)))
    save_adapter(model, tmp_path)
    other = load_adapter(make(), tmp_path)
    assert current_plan(other) == current_plan(model) == made
    state, again = adapter_state(model), adapter_state(other)
    assert {name.rpartition(".")[2] for name in state} == {"A", "B", "A0", "B0"}
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert torch.equal(logits(other, tokens), logits(model, tokens))


@pytest.mark.parametrize("init", TAKEN)
def test_loading_decomposes_no_weight(
    init: str, llama: LlamaForCausalLM, make_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(apply(llama, plan(llama, {"q_proj": partial(LoRA, r=R, init=init)})), tmp_path)
    original = {name: getattr(torch.linalg, name) for name in ("svd", "qr")}

    def of_shapes_alone(name: str, matrix: Tensor, **options: Any) -> Any:
        assert matrix.is_meta
        return original[name](matrix, **options)

    for name in original:
        monkeypatch.setattr(torch.linalg, name, partial(of_shapes_alone, name))
    state = adapter_state(load_adapter(make_llama(), tmp_path))
    assert all(torch.equal(value, adapter_state(llama)[name]) for name, value in state.items())


@pytest.mark.parametrize("init", TAKEN)
def test_removing_puts_the_original_modules_back_and_without_them_it_refuses(
    init: str, llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    modules, before = dict(llama.named_modules()), logits(llama, tokens)
    rules = {"all-linear": partial(LoRA, r=R, init=init)}
    apply(llama, plan(llama, rules))
    assert all(module is modules[name] for name, module in remove(llama).named_modules())
    assert torch.equal(logits(llama, tokens), before)
    apply(llama, plan(llama, rules), keep_base=False)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj and 13 more: the start .* changed"):
        remove(llama)


@pytest.mark.parametrize("init", TAKEN)
def test_the_merged_model_computes_what_the_trained_one_does(init: str, llama64: Any, tokens: Tensor) -> None:
    apply(llama64, plan(llama64, {"all-linear": partial(LoRA, r=R, init=init)})).double()
    for name, parameter in named_trainable(llama64).items():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=key(1, name)))
    before = logits(llama64, tokens)
    torch.testing.assert_close(logits(merge(llama64)[0], tokens), before, rtol=0, atol=1e-5 * float(before.abs().max()))
