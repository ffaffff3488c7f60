"""PEFT folders that a stranger wrote: nothing leads out of them, nothing large is made of them, nothing hangs."""

from __future__ import annotations

import json
import os
import struct
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hostile import fuzz
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lowrank.adapters import IA3, AdaLoRA, LoRA, Prompt, VeRA
from lowrank.adapters.inject import apply, remove
from lowrank.adapters.plan import Rules, plan
from lowrank.errors import RefusedError
from lowrank.export.peft import export_peft, import_peft
from lowrank.export.peft_regex import is_regex

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FUZZED: dict[str, Rules] = {
    "lora": {"all-linear": partial(LoRA, r=2), "embedding": partial(LoRA, r=2)},
    "adalora": {"q_proj": partial(AdaLoRA, init_r=4, target_r=2)},
    "vera": {"q_proj": partial(VeRA, r=4)},
    "ia3": {"q_proj": IA3},
    "prompt": {"backbone": partial(Prompt, length=2)},
}


def exported(model: Any, folder: Path, rules: Rules) -> Path:
    export_peft(apply(model, plan(model, rules)), folder)
    remove(model)
    return folder


@pytest.fixture
def folder(llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    return exported(llama, tmp_path / "adapter", {"q_proj": partial(LoRA, r=2)})


def refused_quickly(model: Any, folder: Path, text: str) -> None:
    start, before = time.monotonic(), dict(model.named_modules())
    with pytest.raises(RefusedError, match=text):
        import_peft(model, folder)
    assert time.monotonic() - start < 5
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_file_that_leads_out_of_the_folder_is_refused(
    name: str, folder: Path, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    os.rename(folder / name, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / name)
    refused_quickly(llama, folder, f"{name}: leads out of its folder")


def test_terabytes_of_hole_that_fit_the_model_are_not_read(folder: Path, llama: LlamaForCausalLM) -> None:
    r, header, end = 10**9, dict[str, Any](), 0
    for name, tensor in load_file(folder / TENSORS).items():
        shape = [r if n == 2 else n for n in tensor.shape]
        start, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / TENSORS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"r": r, "lora_alpha": r}))
    refused_quickly(llama, folder, "values of adapters for a model of .* are not made|cannot be read: unable to mmap")


@pytest.mark.parametrize("length", [0, 100 * 2**30, 2**64 - 1])
def test_a_header_of_any_length_is_refused(length: int, folder: Path, llama: LlamaForCausalLM) -> None:
    (folder / TENSORS).write_bytes(struct.pack("<Q", length) + (folder / TENSORS).read_bytes()[8:])
    refused_quickly(llama, folder, f"{TENSORS}: cannot be read")


def test_an_expression_that_would_take_for_ever_is_refused(folder: Path, llama: LlamaForCausalLM) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for field in ({"target_modules": "([a-z._0-9]+)+X"}, {"rank_pattern": {"(.*)*X": 2}}):
        (folder / CONFIG).write_text(json.dumps(config | field))
        refused_quickly(llama, folder, f"{CONFIG}: {next(iter(field))}: ")


@pytest.mark.parametrize(
    "text",
    [
        *(r".*\.(q|k)_proj", r"^(?!.*visual).*(?:k_proj|q_proj|v_proj).*$", r"(.*\.)?(model\.layers\.\d+\.q_proj)$"),
        *(
            r"a.*|b.*|c.*|d.*|e.*|f.*|g.*",
            r"(?:ab)*c",
            r"[a-z]{1,3}",
            "|".join(rf"layers\.{i}\.q_proj" for i in range(999)),
        ),
    ],
)
def test_expressions_that_folders_have_are_taken(text: str) -> None:
    assert is_regex(text)


@pytest.mark.parametrize(
    "text",
    [
        *("(a+)+", "(a|aa)+", "([a-z]+)*x", "(?:(?:a{1,9}){1,9}){1,9}", "(?=(a+)+)b", "(?:a?){50}", "((?:b|bb)c*)*"),
        *(".*.*.*.*.*.*x", "a?" * 20, "(", "[", "(?P<a", "*", "(" * 5000),
    ],
)
def test_expressions_that_may_take_for_ever_or_are_none_are_not(text: str) -> None:
    assert not is_regex(text)


def check_mutations(method: str, rounds: int, seed: int, model: Any, tmp_path: Path) -> None:
    folder, before = exported(model, tmp_path / "adapter", FUZZED[method]), dict(model.named_modules())

    def load(folder: Path) -> None:
        import_peft(model, folder)
        remove(model)

    assert fuzz(folder, CONFIG, TENSORS, rounds, seed, load) == {"loaded", "refused"}
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("method", FUZZED)
def test_a_mutated_folder_is_imported_or_refused(method: str, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    check_mutations(method, 60, 0, llama, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", FUZZED)
def test_thousands_of_mutated_folders_are_imported_or_refused(
    method: str, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    check_mutations(method, 3000, 1, llama, tmp_path)
