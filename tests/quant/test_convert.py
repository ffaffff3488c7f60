"""From dense to NF4: in place, or streamed from file within the memory of the 4-bit model and one dense layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lowrank.errors import ConfigError
from lowrank.quant.convert import load_quantized, quantizable, quantize, report
from lowrank.quant.nf4 import NF4Linear


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits
    return found


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def skeleton(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(model.config).eval()


def saved(model: Any, folder: Path) -> list[Path]:
    """The model's own tensors by its own names, a tied one once, in one safetensors file."""
    tied = {} if not model.config.tie_word_embeddings else {"lm_head.weight"}
    state = {name: t.contiguous() for name, t in model.state_dict().items() if name not in tied}
    save_file(state, folder / "model.safetensors")
    return [folder / "model.safetensors"]


def test_quantising_is_in_place_and_takes_every_linear_weight_but_the_head(model: Any) -> None:
    linear = [path for path, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and path != "lm_head"]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert quantize(model, "nf4") is model
    assert [path for path, m in model.named_modules() if isinstance(m, NF4Linear)] == linear
    assert model.get_output_embeddings() is head
    assert model.get_input_embeddings() is embedding
    assert type(head) is nn.Linear


def test_a_quantised_model_is_the_dense_one_with_its_weights_rounded(model: Any, tokens: Tensor) -> None:
    rounded: Any = copy.deepcopy(model)
    quantize(model)
    for path, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            dense: Any = rounded.get_submodule(path)
            weight = layer.dequantize()
            dense.weight.data = weight.T.contiguous() if isinstance(dense, Conv1D) else weight
    torch.testing.assert_close(logits(model, tokens), logits(rounded, tokens), rtol=0, atol=1e-5)


def test_conv1d_is_quantised_along_its_input_as_a_linear_would_be(gpt2: GPT2LMHeadModel) -> None:
    conv = gpt2.transformer.h[0].attn.c_attn
    wanted = NF4Linear.from_dense(conv.weight.T, conv.bias, double=True)
    assert same_state(quantize(gpt2).transformer.h[0].attn.c_attn, wanted)


def test_skip_leaves_layers_dense_by_glob_or_bare_name(llama: LlamaForCausalLM) -> None:
    quantize(llama, skip=["lm_head", "q_proj", "*.layers.1.mlp.*"])
    dense = [path for path, m in llama.named_modules() if isinstance(m, nn.Linear)]
    wanted = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    wanted += [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert sorted(dense) == sorted([*wanted, "lm_head"])


def test_a_skip_pattern_that_matches_nothing_is_an_error_before_anything_changes(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"quant\.skip: 'q_porj' matches no linear layer\. Nearest: 'q_proj'\."):
        quantize(llama, skip=["lm_head", "q_porj"])
    assert not any(isinstance(m, NF4Linear) for m in llama.modules())


def test_an_unknown_kind_is_an_error(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"'nf3' is unknown\. Allowed: nf4"):
        quantize(llama, "nf3")


def test_the_head_stays_dense_whatever_it_is_called_and_whatever_skip_says(model: Any) -> None:
    assert "lm_head" not in quantizable(model, [])


def test_quantising_twice_changes_nothing(llama: LlamaForCausalLM) -> None:
    once = copy.deepcopy(quantize(llama))
    assert same_state(quantize(llama), once)


def test_modes_and_options_reach_every_layer(llama: LlamaForCausalLM) -> None:
    quantize(llama.train(), double=False, compute_dtype=torch.bfloat16)
    layers = [m for m in llama.modules() if isinstance(m, NF4Linear)]
    assert all(layer.training and layer.compute_dtype == torch.bfloat16 and layer.nested is None for layer in layers)


def test_a_quantised_models_state_dict_round_trips(model: Any, tokens: Tensor) -> None:
    other = quantize(type(model)(model.config).eval())
    quantize(model)
    other.load_state_dict(model.state_dict())
    assert same_state(model, other)
    assert torch.equal(logits(model, tokens), logits(other, tokens))


@pytest.mark.parametrize(("double", "least"), [(True, 7.7), (False, 7.1)])
def test_linear_weights_shrink_sevenfold_from_fp32_and_the_report_says_so(double: bool, least: float) -> None:
    model = nn.Sequential(nn.Linear(576, 1536, bias=True), nn.Linear(1536, 576), nn.Linear(576, 192))
    before = sum(4 * m.weight.numel() for m in model if isinstance(m, nn.Linear))
    found = report(quantize(model, double=double))
    assert (found.layers, found.before) == (3, before)
    assert found.after == sum(m.nbytes for m in model.modules() if isinstance(m, NF4Linear))
    assert found.before / found.after >= least
    assert f"3 linear weights, {before / 2**20:,.1f} MiB in fp32" in str(found)
    assert f"{found.before / found.after:.2f}×" in str(found)


def test_the_report_of_a_dense_model_says_so(llama: LlamaForCausalLM) -> None:
    assert str(report(llama)) == "nf4: no linear weights to quantise"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_loading_quantised_equals_quantising_what_was_loaded(
    model: Any, double: bool, dtype: torch.dtype, tokens: Tensor, tmp_path: Path
) -> None:
    files = saved(model, tmp_path)
    # loaded as transformers does: model.to(dtype) would also cast the rotary frequencies, which stay fp32
    wanted = quantize(
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=dtype).eval(),
        double=double,
    )
    found = load_quantized(skeleton(model), files, dtype=dtype, double=double)
    assert same_state(found, wanted)
    assert torch.equal(logits(found, tokens), logits(wanted, tokens))
    assert not any(t.is_meta for t in [*found.parameters(), *found.buffers()])
    assert not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_streamed_model_keeps_its_skeletons_mode(training: bool, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    found = load_quantized(skeleton(llama).train(training), saved(llama, tmp_path), dtype=torch.float32)
    assert {module.training for module in found.modules()} == {training}


@pytest.mark.parametrize("tied", [True, False])
def test_what_the_architecture_ties_is_tied_after_streaming(
    tied: bool, make_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    model = make_llama(tie_word_embeddings=tied)
    found = load_quantized(skeleton(model), saved(model, tmp_path), dtype=torch.float32)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied


def test_weights_in_several_files_in_any_order_stream_the_same(model: Any, tmp_path: Path) -> None:
    [whole] = saved(model, tmp_path)
    tensors = load_file(whole)
    names = sorted(tensors, reverse=True)  # biases and weights change places
    for part in range(3):
        save_file({name: tensors[name] for name in names[part::3]}, tmp_path / f"part-{part}.safetensors")
    parts = sorted(tmp_path.glob("part-*"))
    found = load_quantized(skeleton(model), parts, dtype=torch.float32)
    assert same_state(found, quantize(model))


def test_a_skipped_layer_stays_dense_in_the_given_dtype(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    skip = ["lm_head", "q_proj"]
    found = load_quantized(
        skeleton(llama), saved(llama, tmp_path), dtype=torch.bfloat16, skip=skip, compute_dtype=torch.float16
    )
    assert same_state(found, quantize(llama.bfloat16(), skip=skip))
    layer = found.get_submodule("model.layers.0.self_attn.k_proj")
    assert isinstance(layer, NF4Linear)
    assert layer.compute_dtype == torch.float16


@pytest.mark.parametrize("name", ["h.0.attn.c_attn.weight", "transformer.h.0.attn.bias", "model.x.weight", "weight"])
def test_names_that_are_not_the_models_own_raise_key_error(name: str, gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    """GPT-2's own files lack the ``transformer.`` of the model's names: the caller then loads it dense."""
    files = saved(gpt2, tmp_path)
    save_file({name: torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(KeyError):
        load_quantized(skeleton(gpt2), [*files, tmp_path / "more.safetensors"], dtype=torch.float32)


def test_a_missing_weight_raises_key_error(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    state = dict(llama.state_dict())
    del state["model.layers.1.self_attn.q_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(KeyError, match="q_proj"):
        load_quantized(skeleton(llama), [tmp_path / "model.safetensors"], dtype=torch.float32)
