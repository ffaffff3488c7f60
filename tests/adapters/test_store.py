"""An adapter's folder: written whole, read bit for bit, refused with a name where it is damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lowrank.adapters import Full, LoRA
from lowrank.adapters.inject import adapter_state, apply, current_plan, named_trainable, remove
from lowrank.adapters.plan import Rules, plan
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.errors import ConfigError, RefusedError
from lowrank.keys import key
from lowrank.quant.convert import quantize

RULES: Rules = {"all-linear": partial(LoRA, r=2, alpha=3.0, dropout=0.1), "embedding": partial(LoRA, r=3)}

NAMES = ["lora", "lora beside full", "full"]


def trained(model: nn.Module, rules: Rules = RULES) -> nn.Module:
    apply(model, plan(model, rules), seed=5)
    for name, parameter in named_trainable(model).items():
        parameter.data.normal_(0, 0.1, generator=key(1, name))
    return model


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits
    return found


@pytest.mark.parametrize(
    "rules", [RULES, {"*norm*": Full, "q_proj": LoRA}, {"*ln*": Full}], ids=["lora", "both", "full"]
)
def test_a_saved_adapter_loads_bit_for_bit(model: nn.Module, rules: Rules, tokens: Tensor, tmp_path: Path) -> None:
    if isinstance(model, GPT2LMHeadModel) == ("*norm*" in rules):
        rules = {"all-linear": LoRA}
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    wrapped = trained(model, rules)
    assert save_adapter(wrapped, tmp_path / "adapter") == tmp_path / "adapter"
    assert load_adapter(fresh, tmp_path / "adapter") is fresh
    assert torch.equal(logits(fresh, tokens), logits(wrapped, tokens))
    assert current_plan(fresh) == current_plan(wrapped)
    found, wanted = adapter_state(fresh), adapter_state(wrapped)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_file_holds_the_bare_models_names_and_nothing_of_the_base(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    save_adapter(trained(llama), tmp_path, base="3f2a")
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert tensors.keys() == named_trainable(llama).keys()
    assert sorted(os.listdir(tmp_path)) == ["adapter.json", "adapter.safetensors"]
    assert json.loads((tmp_path / "adapter.json").read_text(encoding="utf-8"))["base"] == "3f2a"


def test_an_adapter_trained_on_the_dense_base_loads_onto_nf4_and_back(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    wrapped = trained(llama)
    save_adapter(wrapped, tmp_path)
    wanted = {name: t.detach().clone() for name, t in adapter_state(wrapped).items()}
    loaded = load_adapter(quantize(remove(llama)), tmp_path)
    assert all(torch.equal(t, wanted[name]) for name, t in adapter_state(loaded).items())


def test_what_is_loaded_trains_on(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    names = list(named_trainable(trained(llama)))
    save_adapter(llama, tmp_path)
    assert list(named_trainable(load_adapter(remove(llama), tmp_path))) == names


def test_a_bare_model_has_nothing_to_save(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model carries no adapter"):
        save_adapter(llama, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_saving_again_replaces_what_was_there(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    wrapped = trained(llama)
    save_adapter(wrapped, tmp_path)
    for parameter in named_trainable(wrapped).values():
        parameter.data.add_(1)
    wanted = {name: t.detach().clone() for name, t in adapter_state(wrapped).items()}
    save_adapter(wrapped, tmp_path)
    loaded = load_adapter(remove(llama), tmp_path)
    assert all(torch.equal(t, wanted[name]) for name, t in adapter_state(loaded).items())


def edit_plan(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter.json"
        about = json.loads(path.read_text())
        change(about)
        path.write_text(json.dumps(about))

    return damage


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter.safetensors")

    return damage


def set_row(name: str, value: Any) -> Callable[[Path], None]:
    return edit_plan(lambda about: about["plan"]["rows"][0].update({name: value}))


def set_option(name: str, value: Any) -> Callable[[Path], None]:
    return edit_plan(lambda about: about["plan"]["rows"][0]["options"].update({name: value}))


def flip_a_bit(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


A = "model.embed_tokens.adapter.A"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no plan": (lambda folder: (folder / "adapter.json").unlink(), "no adapter.json there"),
    "no tensors": (lambda folder: (folder / "adapter.safetensors").unlink(), "no adapter.safetensors there"),
    "not json": (lambda folder: (folder / "adapter.json").write_text("{"), "cannot be read"),
    "not text": (lambda folder: (folder / "adapter.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "a list": (lambda folder: (folder / "adapter.json").write_text("[]"), "adapter.json"),
    "torn": (lambda folder: (folder / "adapter.safetensors").write_bytes(b"\0" * 5), "cannot be read"),
    "a flipped bit": (flip_a_bit, "adapter.safetensors: damaged"),
    "no rows": (edit_plan(lambda about: about["plan"].pop("rows")), "not the plan of an adapter"),
    "an empty list of rows": (edit_plan(lambda about: about["plan"].update(rows=[])), "it has no rows"),
    "rows of another shape": (edit_plan(lambda about: about["plan"].update(rows=3)), "not the plan of an adapter"),
    "a row too much": (set_row("more", 1), "not the plan of an adapter"),
    "a path that is none": (set_row("path", [1]), "adapter.json"),
    "options that are none": (set_row("options", 3), "adapter.json"),
    "an option out of range": (set_option("r", 0), "adapter.json"),
    "an option that is unknown": (set_option("rank", 2), "adapter.json"),
    "another rank": (set_option("r", 5), rf"{A} has shape \(3, 64\), not \(5, 64\)"),
    "a tensor missing": (edit_tensors(lambda tensors: tensors.pop(A)), f"{A} is missing"),
    "a tensor too much": (edit_tensors(lambda tensors: tensors.update(x=torch.zeros(1))), "x is not part of the plan"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_the_model_unchanged(
    damage: str, llama: LlamaForCausalLM, tokens: Tensor, tmp_path: Path
) -> None:
    save_adapter(trained(llama), tmp_path)
    remove(llama).requires_grad_(True)
    modules, before = dict(llama.named_modules()), logits(llama, tokens)
    spoil, text = DAMAGES[damage]
    spoil(tmp_path)
    with pytest.raises(RefusedError, match=text):
        load_adapter(llama, tmp_path)
    assert dict(llama.named_modules()) == modules
    assert torch.equal(logits(llama, tokens), before)
    assert all(p.requires_grad for p in llama.parameters())


def test_full_values_of_a_refused_folder_do_not_reach_the_base(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    save_adapter(trained(llama, {"*norm*": Full}), tmp_path)
    llama.load_state_dict(before)
    edit_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}))(tmp_path)
    remove(llama)
    with pytest.raises(RefusedError, match=r"model\.norm\.weight has shape"):
        load_adapter(llama, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_an_adapter_of_another_model_is_a_configuration_error(
    llama: LlamaForCausalLM, gpt2: GPT2LMHeadModel, tmp_path: Path
) -> None:
    save_adapter(trained(llama), tmp_path)
    with pytest.raises(ConfigError, match="is not a site of this model"):
        load_adapter(gpt2, tmp_path)


def test_a_folder_never_imports_what_is_no_adapter(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    save_adapter(trained(llama), tmp_path)
    (tmp_path / "canary.py").write_text("raise SystemExit('the folder ran code')\n")
    set_row("adapter", "torch.nn.Linear")(tmp_path)
    with pytest.raises((ConfigError, RefusedError), match=r"torch\.nn\.Linear"):
        load_adapter(remove(llama), tmp_path)


@pytest.mark.parametrize("operation", ["adapter.safetensors", "adapter.json"])
def test_a_crash_while_saving_again_never_leaves_a_mix(
    operation: str, llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(trained(llama, {"q_proj": partial(LoRA, r=2, alpha=1.0)}), tmp_path)
    wanted = {name: t.detach().clone() for name, t in adapter_state(llama).items()}
    remove(llama)
    again = trained(llama, {"q_proj": partial(LoRA, r=2, alpha=100.0)})

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(operation):
            raise OSError(28, "No space left on device")
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(again, tmp_path)
    try:
        loaded = load_adapter(remove(llama), tmp_path)
    except RefusedError:
        return
    assert [row.options["alpha"] for row in current_plan(loaded).rows] == [1.0, 1.0]
    assert all(torch.equal(t, wanted[name]) for name, t in adapter_state(loaded).items())


def test_a_method_of_ours_is_found_whichever_file_it_was_in_when_it_was_saved(
    make_llama: Callable[..., LlamaForCausalLM], tokens: Tensor, tmp_path: Path
) -> None:
    wrapped = trained(make_llama())
    save_adapter(wrapped, tmp_path)
    file = tmp_path / "adapter.json"
    written = file.read_text(encoding="utf-8")
    assert '"lowrank.adapters.LoRA"' in written
    file.write_text(written.replace("lowrank.adapters.LoRA", "lowrank.adapters.lora.LoRA"), encoding="utf-8")
    assert torch.equal(logits(load_adapter(make_llama(), tmp_path), tokens), logits(wrapped, tokens))
