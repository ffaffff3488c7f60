"""A PEFT folder of any method that is damaged, or asks for what is not supported: its file and field are named, and the
model is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from both_ways import CONFIG, QUIET, TENSORS, of_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank.errors import ConfigError, RefusedError
from lowrank.export.peft import import_peft

pytestmark = QUIET

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TARGETS = {"target_modules": ["q_proj"]}
WRITTEN: dict[str, dict[str, Any]] = {
    "Lora": {**TARGETS, "r": 4, "use_dora": True},
    "AdaLora": {**TARGETS, "init_r": 4, "total_step": 10},
    "Vera": {**TARGETS, "r": 8},
    "IA3": {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
    "LoHa": {**TARGETS, "r": 4},
    "LoKr": {**TARGETS, "r": 2},
    "OFT": {**TARGETS, "oft_block_size": 8},
    "PrefixTuning": {"num_virtual_tokens": 3},
    "PromptTuning": {"num_virtual_tokens": 3},
}


@pytest.fixture
def bare(make_base: Callable[..., Any]) -> Any:
    return make_base("llama")


@pytest.fixture
def written(tmp_path: Path, bare: Any) -> Callable[[str], Path]:
    def write(method: str) -> Path:
        of_peft(bare, method, **WRITTEN[method]).save_pretrained(tmp_path)
        return tmp_path

    return write


def refused(error: type[Exception], text: str, model: Any, folder: Path, **options: Any) -> None:
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    with pytest.raises(error) as found:
        import_peft(model, folder, **options)
    assert text in str(found.value)
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before


FIELDS: list[tuple[str, str, Any]] = [
    ("Lora", "init_lora_weights", "pissa"),  # not with DoRA
    ("AdaLora", "init_r", 0),
    ("AdaLora", "target_r", "8"),
    ("AdaLora", "lora_alpha", -1),
    ("AdaLora", "use_rslora", True),
    ("AdaLora", "alpha_pattern", {"q_proj": 2}),
    ("AdaLora", "rank_pattern", {"q_proj": 4}),
    ("AdaLora", "rank_pattern", {"model.layers.0.self_attn.q_proj.lora_E": [True]}),
    ("AdaLora", "rank_pattern", {"model.layers.0.self_attn.q_proj.lora_E": [1, 0, 1, 1]}),
    ("Vera", "r", None),
    ("Vera", "d_initial", 0),
    ("Vera", "bias", "vera_only"),
    ("Vera", "save_projection", 1),
    ("Vera", "projection_prng_key", -1),
    ("Vera", "modules_to_save", ["lm_head"]),
    ("IA3", "feedforward_modules", 3),
    ("IA3", "feedforward_modules", "("),
    ("IA3", "modules_to_save", ["lm_head"]),
    ("LoHa", "r", True),
    ("LoHa", "rank_dropout", 0.1),
    ("LoHa", "module_dropout", 0.1),
    ("LoHa", "rank_pattern", {"(": 2}),
    ("LoKr", "decompose_both", True),
    ("LoKr", "decompose_factor", 0),
    ("LoKr", "rank_dropout_scale", True),
    ("LoKr", "alpha_pattern", {"q_proj": 0}),
    ("LoKr", "alpha_pattern", {"q_proj": 2, r"layers\.0\..*": 3}),
    ("OFT", "coft", True),
    ("OFT", "block_share", True),
    ("OFT", "module_dropout", 0.2),
    ("OFT", "bias", "oft_only"),
    ("OFT", "use_cayley_neumann", "yes"),
    ("OFT", "num_cayley_neumann_terms", 2),
    ("OFT", "peft_version", "0.17.1"),
    ("OFT", "peft_version", None),
    ("OFT", "oft_block_size", -8),
    ("PrefixTuning", "num_virtual_tokens", None),
    ("PrefixTuning", "num_transformer_submodules", 2),
    ("PromptTuning", "num_virtual_tokens", 0),
    ("PromptTuning", "a_field_of_a_later_peft", {"on": True}),
]


@pytest.mark.parametrize(("method", "field", "value"), FIELDS)
def test_a_field_that_is_not_supported_is_refused_by_its_name(
    method: str, field: str, value: Any, bare: Any, written: Callable[[str], Path]
) -> None:
    folder = written(method)
    edit_config(folder, field, value)
    refused(RefusedError, f"{folder / CONFIG}: {field}: ", bare, folder)


def edit_config(folder: Path, field: str, value: Any) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(fields | {field: value}))


CONTRADICTIONS: list[tuple[str, str, Any, str]] = [
    ("Lora", "use_dora", False, "q_proj.lora_magnitude_vector is not part of a LoRA with this adapter_config.json"),
    ("Vera", "r", 4, "q_proj.vera_lambda_d has shape (8,), not (4,)"),
    ("Vera", "save_projection", False, "base_model.vera_A is not part of a VeRA with this adapter_config.json"),
    ("IA3", "feedforward_modules", [], "up_proj.ia3_l has shape (1, 64), not (128, 1)"),
    ("IA3", "feedforward_modules", ".*", "q_proj.ia3_l has shape (64, 1), not (1, 64)"),
    ("LoHa", "r", 3, "says rank 3 for model.layers.0.self_attn.q_proj, but its tensors have rank 4"),
    ("LoKr", "r", 3, "q_proj.lokr_w2_a has shape (8, 2), not (8, 3)"),
    ("LoKr", "r", 64, "q_proj.lokr_w2 is missing"),
    ("LoKr", "decompose_factor", 2, "q_proj.lokr_w1 has shape (8, 8), not (2, 2)"),
    ("OFT", "oft_block_size", 16, "says blocks of 16 for model.layers.0.self_attn.q_proj, but its tensor has blocks"),
    ("OFT", "r", 2, "says 2 blocks for model.layers.0.self_attn.q_proj, but its tensor has blocks of 8"),
    ("PrefixTuning", "num_virtual_tokens", 2, "prompt_embeddings has shape (3, 128), not (2, 128)"),
    ("PromptTuning", "num_virtual_tokens", 5000, "length: 5000 is not allowed; fewer than the model's 1,024 positions"),
    ("AdaLora", "peft_type", "VERA", "is not supported with VERA"),
    # Sizes that no memory has: what a file only says is never made.
    ("AdaLora", "init_r", 10**12, "q_proj.lora_A has shape (4, 64), not (1000000000000, 64)"),
    ("Vera", "r", 10**12, "q_proj.vera_lambda_d has shape (8,), not (1000000000000,)"),
]


@pytest.mark.parametrize(("method", "field", "value", "text"), CONTRADICTIONS)
def test_a_configuration_that_is_not_that_of_the_tensors_is_refused(
    method: str, field: str, value: Any, text: str, bare: Any, written: Callable[[str], Path]
) -> None:
    folder = written(method)
    edit_config(folder, field, value)
    refused(RefusedError, text, bare, folder)


def one_of(tensors: dict[str, Tensor]) -> str:
    """A tensor's name: of the first site, or of none."""
    return sorted(name for name in tensors if name.startswith(Q0) or "." not in name)[-1]


DAMAGE: dict[str, Callable[[dict[str, Tensor], str], object]] = {
    "missing": lambda tensors, name: tensors.pop(name),
    "another shape": lambda tensors, name: tensors.update({name: torch.cat([tensors[name]] * 2, dim=-1)}),
    "flat": lambda tensors, name: tensors.update({name: tensors[name].flatten().repeat(2)}),
    "integers": lambda tensors, name: tensors.update({name: tensors[name].int()}),
    "one too many": lambda tensors, name: tensors.update({f"{Q0}.more": torch.ones(3)}),
}


@pytest.mark.parametrize("method", WRITTEN)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tensor_is_refused_by_its_name(
    method: str, damage: str, bare: Any, written: Callable[[str], Path]
) -> None:
    folder = written(method)
    tensors = load_file(folder / TENSORS)
    name = one_of(tensors)
    DAMAGE[damage](tensors, name)
    save_file(tensors, folder / TENSORS)
    text = f"{folder / TENSORS}: {name.removeprefix('base_model.model.')}"
    if damage == "one too many":
        text = f"{folder / TENSORS}: {Q0}.more is not part of"
    elif damage == "missing" and method in ("IA3", "OFT"):  # a site has this one alone
        text = f"{folder / TENSORS}: no tensors for model.layers.0.self_attn.q_proj"
    refused(RefusedError, text, bare, folder)


@pytest.mark.parametrize("method", WRITTEN)
def test_an_adapter_for_another_model_is_refused(
    method: str, written: Callable[[str], Path], make_base: Callable[..., Any], make_llama: Callable[..., Any]
) -> None:
    folder = written(method)
    if method == "PromptTuning":
        refused(RefusedError, "prompt_embeddings has shape (3, 64), not (3, 32)", make_llama(), folder)
    elif method == "PrefixTuning":
        refused(RefusedError, "prompt_embeddings has shape (3, 128), not (3, 256)", make_base("gpt2"), folder)
    else:
        refused(ConfigError, "more: no such linear layer", make_base("gpt2"), folder)
        error = ConfigError if method == "Lora" else RefusedError
        refused(error, str(folder), make_llama(), folder)


def test_a_name_that_is_taken_is_refused(bare: Any, written: Callable[[str], Path]) -> None:
    folder = written("IA3")
    import_peft(bare, folder, name="a")
    refused(ConfigError, "an adapter 'a' is on the model already", bare, folder, name="a")
