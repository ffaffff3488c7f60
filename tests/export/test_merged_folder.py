"""A merged model is a plain transformers folder that computes what the wrapped model computed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

from lowrank.adapters import Adapter, LoRA
from lowrank.adapters.inject import apply
from lowrank.adapters.methods.full import Full
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import adapted
from lowrank.errors import ConfigError
from lowrank.export import merged as merging
from lowrank.export.merged import save_merged
from lowrank.models import attention
from lowrank.models.quiet import quiet
from lowrank.models.tiny import byte_tokenizer
from lowrank.quant.convert import quantize

TOKENIZER = byte_tokenizer(adds_bos=True)


def reloaded(folder):
    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rules", [{"all-linear": {"r": 4}}, {"*.0.*": {"r": 2}}], ids=["all-linear", "one layer"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_transformers_loads_the_same_logits(kind, rules, quantized, tmp_path, make_base, lora_on, logits_of):
    bare = quantize(make_base(kind)) if quantized else make_base(kind)
    ours = lora_on(bare, rules)
    before = logits_of(ours)
    report = save_merged(ours, TOKENIZER, tmp_path / "out")
    plain = reloaded(tmp_path / "out")
    assert (logits_of(plain) - before).abs().max() <= 1e-5
    assert len(report.sites) == len(list(adapted(ours)))
    assert torch.equal(logits_of(ours), before), "the model itself is left as it was"
    assert {type(m) for m in plain.modules()} == {type(m) for m in make_base(kind).modules()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_stay_tied_unless_an_adapter_parts_them(kind, tmp_path, make_base, lora_on, logits_of):
    inner = lora_on(make_base(kind), {"all-linear": {"r": 2}})
    save_merged(inner, TOKENIZER, tmp_path / "tied")
    tied = reloaded(tmp_path / "tied")
    assert tied.lm_head.weight is tied.get_input_embeddings().weight

    for site in ("embedding", "lm_head"):
        ours = lora_on(make_base(kind), {site: {"r": 2}})
        save_merged(ours, TOKENIZER, tmp_path / site)
        untied = reloaded(tmp_path / site)
        assert config(tmp_path / site)["tie_word_embeddings"] is False
        assert untied.lm_head.weight is not untied.get_input_embeddings().weight
        assert (logits_of(untied) - logits_of(ours)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_file_names_our_attention_or_a_quantisation(kind, tmp_path, make_base, lora_on, logits_of):
    bare = quantize(make_base(kind))
    assert attention.install(bare) is None
    ours = lora_on(bare, {"all-linear": {"r": 2}})
    save_merged(ours, TOKENIZER, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.json"):
        text = path.read_text()
        assert "lowrank" not in text
        assert "quantization" not in text
    assert (logits_of(reloaded(tmp_path / "out")) - logits_of(ours)).abs().max() <= 1e-5
    assert ours.config._attn_implementation == "lowrank"


def test_an_nf4_base_of_a_bf16_model_is_written_in_bf16(tmp_path, make_base, lora_on):
    ours = lora_on(quantize(make_base("gpt2", torch.bfloat16)), {"c_attn": {"r": 2}})
    save_merged(ours, TOKENIZER, tmp_path / "out")
    assert config(tmp_path / "out")["dtype"] == "bfloat16"
    plain = reloaded(tmp_path / "out")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert isinstance(plain.transformer.h[0].mlp.c_fc, Conv1D)


def test_a_fully_tuned_model_is_written_with_its_own_weights(tmp_path, make_base, logits_of):
    model = make_base("llama")
    apply(model, plan(model, {"*norm.weight": Full}))
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    save_merged(model, TOKENIZER, tmp_path / "out")
    assert torch.equal(logits_of(reloaded(tmp_path / "out")), logits_of(model))


def test_tokenizer_and_generation_settings_are_there(tmp_path, make_base, lora_on):
    ours = lora_on(make_base("llama"), {"q_proj": {}})
    ours.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=257, pad_token_id=258)
    save_merged(ours, TOKENIZER, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("héllo") == TOKENIZER.encode("héllo")
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    plain = reloaded(tmp_path / "out")
    assert plain.generate(torch.tensor([[1, 2]]), do_sample=False).shape[1] <= 9


def test_an_empty_folder_is_filled_and_one_that_is_not_is_refused(tmp_path, make_base, lora_on):
    ours = lora_on(make_base("llama"), {"q_proj": {}})
    (tmp_path / "empty").mkdir()
    save_merged(ours, TOKENIZER, tmp_path / "empty")
    with pytest.raises(ConfigError, match="empty: not empty"):
        save_merged(ours, TOKENIZER, tmp_path / "empty")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match="file: not a folder"):
        save_merged(ours, TOKENIZER, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


class BrokenTokenizer:
    def save_pretrained(self, folder) -> None:
        raise OSError("disk full")


def test_a_write_that_fails_leaves_nothing(tmp_path, make_base, lora_on):
    ours = lora_on(make_base("llama"), {"q_proj": {}})
    with pytest.raises(OSError, match="disk full"):
        save_merged(ours, BrokenTokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Scale(Adapter):
    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.ones(()))

    def forward(self, base: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.s * base(x)


def test_a_method_that_cannot_be_merged_is_refused_with_its_site(tmp_path, make_base):
    model = make_base("llama")
    apply(model, plan(model, {"q_proj": LoRA, "v_proj": Scale}))
    with pytest.raises(ConfigError, match=r"v_proj: Scale is not a change of weight"):
        save_merged(model, TOKENIZER, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_restoring_layers_leaves_what_is_dense_already(make_base):
    model = make_base("gpt2")
    before = copy.copy(model.state_dict())
    merging.restore_layers(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
