"""Adapter folders of strangers: refused by name before memory is taken for them, and no code of theirs runs."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hostile import fuzz
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lowrank.adapters import DoRA, LoRA, Prefix, Prompt, VeRA
from lowrank.adapters.combine import combine
from lowrank.adapters.inject import apply, current_plan, remove
from lowrank.adapters.plan import Rules, plan
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.errors import ConfigError, RefusedError

PLAN, TENSORS = "adapter.json", "adapter.safetensors"
MODULE = """
from pathlib import Path
from lowrank.adapters import LoRA
Path(__file__).with_name("ran").touch()
class Mine(LoRA):
    pass
"""


def save(model: Any, folder: Path, rules: Rules) -> Path:
    save_adapter(apply(model, plan(model, rules)), folder)
    remove(model)
    return folder


@pytest.fixture
def folder(llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    return save(llama, tmp_path / "adapter", {"q_proj": partial(LoRA, r=2)})


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    about = json.loads((folder / PLAN).read_text())
    change(about)
    (folder / PLAN).write_text(json.dumps(about))


def describe(folder: Path, header: dict[str, Any], size: int = 0) -> None:
    """A tensor file of this header whose values, if any, are a hole in the disk."""
    text = json.dumps(header).encode()
    with (folder / TENSORS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)


def refused_quickly(load: Callable[[], Any], text: str) -> None:
    start = time.monotonic()
    with pytest.raises(RefusedError, match=text):
        load()
    assert time.monotonic() - start < 5


# Sizes


@pytest.mark.parametrize("r", [10**9, 2**40, 2**62, 2**63 - 1])
def test_a_rank_without_its_tensors_takes_no_memory(r: int, folder: Path, llama: LlamaForCausalLM) -> None:
    edit(folder, lambda about: [row["options"].update(r=r) for row in about["plan"]["rows"]])
    refused_quickly(lambda: load_adapter(llama, folder), PLAN)
    refused_quickly(lambda: combine([folder], [1.0], folder.parent / "made"), "combine: ")


def test_terabytes_of_hole_that_fit_the_plan_are_not_read(folder: Path, llama: LlamaForCausalLM) -> None:
    r, header, end = 10**9, dict[str, Any](), 0
    for name, tensor in load_file(folder / TENSORS).items():
        shape = [r if n == 2 else n for n in tensor.shape]
        start, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    describe(folder, header, end)
    edit(folder, lambda about: [row["options"].update(r=r) for row in about["plan"]["rows"]])
    refused_quickly(lambda: load_adapter(llama, folder), "values of adapters for a model of .* parameters are not made")


@pytest.mark.parametrize("length", [0, 1, 100 * 2**30, 2**63, 2**64 - 1])
def test_a_header_of_any_length_is_refused(length: int, folder: Path, llama: LlamaForCausalLM) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(struct.pack("<Q", length) + content[8:])
    refused_quickly(lambda: load_adapter(llama, folder), f"{TENSORS}: cannot be read")


def test_ten_million_rows_are_not_parsed(folder: Path, llama: LlamaForCausalLM) -> None:
    row = json.loads((folder / PLAN).read_text())["plan"]["rows"][0]
    with (folder / PLAN).open("w") as file:
        file.write('{"plan": {"rows": [')
        file.truncate(10**7 * len(json.dumps(row)))
    refused_quickly(lambda: load_adapter(llama, folder), rf"{PLAN}: cannot be read: larger than")


def test_more_rows_than_sites_are_refused_before_any_is_made(folder: Path, llama: LlamaForCausalLM) -> None:
    def multiply(about: dict[str, Any]) -> None:
        row = about["plan"]["rows"][0]
        about["plan"]["rows"] = [row | {"path": f"{row['path']}{i}"} for i in range(5_000)]

    edit(folder, multiply)
    start = time.monotonic()
    with pytest.raises(ConfigError, match="is not a site of this model"):
        load_adapter(llama, folder)
    assert time.monotonic() - start < 10
    edit(folder, lambda about: about["plan"].update(rows=about["plan"]["rows"][:1] * 2))
    refused_quickly(lambda: load_adapter(llama, folder), "two rows are for one site")


def test_a_site_too_large_to_build_is_refused_by_the_combinations_that_would(
    folder: Path, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    n, header, end, rows = 2**20, dict[str, Any](), 0, json.loads((folder / PLAN).read_text())["plan"]["rows"]
    for row in rows:
        for name, shape in (("A", [2, n]), ("B", [n, 2])):
            header[f"{row['path']}.adapter.{name}"] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [end, end + 8 * n],
            }
            end += 8 * n
    describe(folder, header, end)
    edit(folder, lambda about: [row.update(shape=[n, n]) for row in about["plan"]["rows"]])
    refused_quickly(
        lambda: combine([folder], [1.0], tmp_path / "made", method="ties"), "1048576×1048576; ties and dare"
    )


def test_a_tensor_of_another_kind_is_refused(folder: Path, llama: LlamaForCausalLM) -> None:
    names = {name: tensor.numel() for name, tensor in load_file(folder / TENSORS).items()}
    shapes = {name: list(tensor.shape) for name, tensor in load_file(folder / TENSORS).items()}
    for dtype, size, text in (("I32", 4, "holds int32, not float32"), ("U64", 8, "holds U64, which is not read")):
        header, end = dict[str, Any](), 0
        for name, count in names.items():
            header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [end, end + size * count]}
            end += size * count
        describe(folder, header, end)
        refused_quickly(lambda: load_adapter(llama, folder), text)


# Places


@pytest.mark.parametrize("name", [PLAN, TENSORS])
def test_a_file_that_leads_out_of_the_folder_is_refused(
    name: str, folder: Path, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    os.rename(folder / name, tmp_path / "elsewhere")
    os.symlink("../elsewhere", folder / name)
    refused_quickly(lambda: load_adapter(llama, folder), f"{name}: leads out of its folder")
    os.unlink(folder / name)
    os.mkfifo(folder / name)
    refused_quickly(lambda: load_adapter(llama, folder), f"{name}: not a file")


# Code


@pytest.fixture
def strange(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose plan names a class in a module that can be imported."""
    name = f"strange_{os.getpid()}_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(folder, lambda about: [row.update(adapter=f"{name}.Mine") for row in about["plan"]["rows"]])
    yield folder
    sys.modules.pop(name, None)


def test_a_class_that_is_not_ours_is_not_imported_unless_the_caller_says_so(
    strange: Path, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    for load in (
        lambda: load_adapter(llama, strange),
        lambda: load_adapter(llama, strange, name="one"),
        lambda: load_adapter(llama, strange, foreign=False),
        lambda: combine([strange], [1.0], tmp_path / "made"),
    ):
        refused_quickly(load, r"Mine, which is not lowrank's own.* load_adapter\(model, folder, foreign=True\)")
        assert not (tmp_path / "ran").exists()
    loaded = load_adapter(llama, strange, foreign=True)
    assert (tmp_path / "ran").exists()
    assert {row.method for row in current_plan(loaded).rows} == {"Mine"}


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "torch.nn.Linear", "lowrank.adapters.Adapter", "lowrank.adapters.Adapted", "lowrank.adapters"),
        *(
            "lowrank.adapters.bank.Bank",
            "lowrank.adapters.methods.lora",
            "lowrank.testing.bases.build_llama",
            ".LoRA",
            "",
        ),
        *("../evil.LoRA", "lowrank.adapters.\0.LoRA", "lowrank.adapters. .LoRA", "a" * 10_000),
    ],
)
def test_no_name_is_called_that_is_not_a_method_s(name: str, folder: Path, llama: LlamaForCausalLM) -> None:
    edit(folder, lambda about: about["plan"]["rows"][0].update(adapter=name))
    refused_quickly(lambda: load_adapter(llama, folder), PLAN)


# Everything else


FUZZED: dict[str, Rules] = {
    "lora": {"all-linear": partial(LoRA, r=2), "embedding": partial(LoRA, r=2)},
    "pissa": {"q_proj": partial(LoRA, r=2, init="pissa")},
    "dora": {"v_proj": partial(DoRA, r=2)},
    "vera": {"q_proj": partial(VeRA, r=4)},
    "prefix": {"backbone": partial(Prefix, length=2)},
    "prompt": {"backbone": partial(Prompt, length=2, init="text", init_text=[1, 2])},
}


def loads(model: Any, name: str | None) -> Callable[[Path], None]:
    def load(folder: Path) -> None:
        load_adapter(model, folder, name=name)
        remove(model)

    return load


def check_mutations(method: str, rounds: int, seed: int, model: Any, tmp_path: Path) -> None:
    folder = save(model, tmp_path / "adapter", FUZZED[method])
    before = dict(model.named_modules())
    for name in (None, "one"):
        assert fuzz(folder, PLAN, TENSORS, rounds, seed, loads(model, name)) == {"loaded", "refused"}
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("method", FUZZED)
def test_a_mutated_folder_loads_or_is_refused(method: str, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    check_mutations(method, 30, 0, llama, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", FUZZED)
def test_thousands_of_mutated_folders_load_or_are_refused(method: str, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    check_mutations(method, 3000, 1, llama, tmp_path)


def test_a_mutated_folder_is_combined_or_refused(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    folder, made = save(llama, tmp_path / "adapter", FUZZED["lora"]), iter(range(1000))

    def add(folder: Path) -> None:
        combine([folder], [0.5], tmp_path / str(next(made)))

    assert fuzz(folder, PLAN, TENSORS, 60, 2, add) == {"loaded", "refused"}
