"""A model merged into NF4 is a folder that transformers loads through bitsandbytes: the same bytes, the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank.adapters import LoRA
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.merge import merge
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import adapted
from lowrank.errors import ConfigError, RefusedError
from lowrank.export.merged import save_merged
from lowrank.models import load as models
from lowrank.models.quiet import quiet
from lowrank.models.tiny import byte_tokenizer
from lowrank.quant.convert import quantize
from lowrank.quant.nf4 import NF4Linear

TOKENIZER = byte_tokenizer(adds_bos=True)
CALIBRATION = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))
LINEAR = {"all-linear": {"r": 4}}
NF4: Any = {"to": "nf4", "min_share": None, "calibration": CALIBRATION}


def reloaded(folder: Path) -> Any:
    """By transformers, on bitsandbytes' plain kernel: the one for CPUs with AVX-512 BF16 computes in bf16."""
    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for layer in four_bit(model).values():
        layer.support_avx512bf16_for_cpu = False
    return model.eval()


def four_bit(model: Any) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_transformers_loads_the_same_bytes_and_logits(
    kind: str, quantized: bool, tmp_path: Path, make_base: Any, lora_on: Any, logits_of: Any
) -> None:
    ours = lora_on(quantize(make_base(kind)) if quantized else make_base(kind), LINEAR)
    before = logits_of(ours)
    report = save_merged(ours, TOKENIZER, tmp_path / "out", **NF4)
    assert torch.equal(logits_of(ours), before), "the model itself is left as it was"
    merged, again = merge(ours, **NF4)
    assert report == again
    theirs = reloaded(tmp_path / "out")
    layers = {path: m for path, m in merged.named_modules() if isinstance(m, NF4Linear)}
    assert four_bit(theirs).keys() == layers.keys()
    for path, layer in four_bit(theirs).items():
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(weight, layers[path].dequantize())
    assert (logits_of(theirs) - logits_of(merged)).abs().max() <= 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("héllo") == TOKENIZER.encode("héllo")


@pytest.mark.parametrize("double", [True, False])
def test_statistics_are_written_as_bitsandbytes_writes_its_own(
    double: bool, tmp_path: Path, make_base: Any, lora_on: Any
) -> None:
    ours = lora_on(quantize(make_base("llama"), double=double), LINEAR)
    save_merged(ours, TOKENIZER, tmp_path / "out", **NF4)
    theirs = reloaded(tmp_path / "out")
    one, other = load_file(tmp_path / "out" / "model.safetensors"), theirs.state_dict()
    assert other.keys() - one.keys() == {"lm_head.weight"}  # tied: a file holds it once
    assert not one.keys() - other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    q = "model.layers.0.self_attn.q_proj.weight"
    names = {"absmax", "quant_map", "quant_state.bitsandbytes__nf4"}
    names |= {"nested_absmax", "nested_quant_map"} if double else set()
    assert {name.removeprefix(f"{q}.") for name in one if name.startswith(f"{q}.")} == names


def test_a_bf16_model_computes_in_bf16(tmp_path: Path, make_base: Any, lora_on: Any, logits_of: Any) -> None:
    ours = lora_on(quantize(make_base("gpt2", torch.bfloat16)), LINEAR)
    save_merged(ours, TOKENIZER, tmp_path / "out", **NF4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    theirs, (merged, _) = reloaded(tmp_path / "out"), merge(ours, **NF4)
    assert {layer.compute_dtype for layer in four_bit(theirs).values()} == {torch.bfloat16}
    largest = logits_of(merged).abs().max()
    assert (logits_of(theirs) - logits_of(merged)).abs().max() <= 0.03 * largest


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_not_nf4_stays_dense_there(
    kind: str, tmp_path: Path, make_base: Any, lora_on: Any, logits_of: Any
) -> None:
    skipped = {"llama": "o_proj", "gpt2": "c_fc"}[kind]
    ours = lora_on(quantize(make_base(kind), skip=(skipped,)), {**LINEAR, "lm_head": {"r": 2}})
    save_merged(ours, TOKENIZER, tmp_path / "out", **NF4)
    theirs = reloaded(tmp_path / "out")
    assert not any(path.endswith((skipped, "lm_head")) for path in four_bit(theirs))
    assert len(four_bit(theirs)) == len(list(adapted(ours))) - 3
    assert theirs.lm_head.weight is not theirs.get_input_embeddings().weight
    assert (logits_of(theirs) - logits_of(merge(ours, **NF4)[0])).abs().max() <= 1e-5


def test_a_tie_stays(tmp_path: Path, make_base: Any, lora_on: Any) -> None:
    save_merged(lora_on(quantize(make_base("llama")), LINEAR), TOKENIZER, tmp_path / "out", **NF4)
    theirs = reloaded(tmp_path / "out")
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight


def test_our_own_loader_refuses_the_folder_by_what_it_holds(tmp_path: Path, make_base: Any, lora_on: Any) -> None:
    save_merged(lora_on(quantize(make_base("llama")), LINEAR), TOKENIZER, tmp_path / "out", **NF4)
    with pytest.raises(ConfigError, match=r"model.name: the weights in .* are quantised already \(bitsandbytes\)"):
        models.config(SimpleNamespace(kind="hf", name=str(tmp_path / "out"), revision=None))


def test_an_adapter_that_would_be_lost_writes_nothing(tmp_path: Path, make_base: Any, lora_on: Any) -> None:
    ours = lora_on(quantize(make_base("llama")), LINEAR)
    for name, parameter in named_trainable(ours).items():
        parameter.data.mul_(0.01 if name.endswith("B") else 1)
    with pytest.raises(RefusedError, match="of the adapter's effect would survive"):
        save_merged(ours, TOKENIZER, tmp_path / "out", to="nf4", method="naive")
    assert list(tmp_path.iterdir()) == []


def test_a_width_that_blocks_do_not_divide_is_refused(tmp_path: Path, make_llama: Any) -> None:
    model = quantize(make_llama())  # 32 wide
    apply(model, plan(model, {"q_proj": LoRA}))
    with pytest.raises(ConfigError, match=r"q_proj is 32 wide, no multiple of 64: .* Use to=dense"):
        save_merged(model, TOKENIZER, tmp_path / "out", to="nf4", method="naive")
    assert list(tmp_path.iterdir()) == []
