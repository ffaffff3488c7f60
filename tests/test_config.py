"""The schema: what parses, what is refused, and the exact words."""

import subprocess
import sys
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

from lowrank import config
from lowrank.adapters import Adapter
from lowrank.compose import compose, find_conf
from lowrank.errors import ConfigError, RefusedError
from lowrank.rules import RULES
from lowrank.schema import GROUPS

CHOICES = [
    *("model=smollm2", "model=tiny_llama", "model=tiny_gpt2", "quant=nf4", "adapter=full"),
    *("data=jsonl data.path=a.jsonl", "data=csv data.path=a.csv", "optim=adamw8bit", "optim=sgd"),
    *("schedule=cosine", "schedule=constant", "track=tensorboard", "track=wandb", "experiment=demo"),
    "model=hf model.name=some/folder",
    "adapter.targets={*.q_proj:{r:8},v_proj:null}",
    "schedule.kind=polynomial +schedule.options.power=2",
    "loop.steps=null loop.epochs=0.5 loop.micro_batch=null loop.micro_batch_tokens=512",
]


class Scaled(Adapter):
    """An adapter with an option of each kind, as a user would write one."""

    def __init__(self, base: nn.Module, *, generator: torch.Generator, size: int, scale: float = 1.0) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size: {size} is not allowed; a positive integer.")
        self.weight = nn.Parameter(torch.ones(size))


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return compose(["model=tiny_llama"]).to_dict()


@pytest.fixture
def tree(composed: dict[str, Any]) -> dict[str, Any]:
    return deepcopy(composed)


def put(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, key = path.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    node[key] = value
    return tree


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(tree)
    return str(caught.value)


@pytest.mark.parametrize("overrides", CHOICES)
def test_a_configuration_survives_its_own_dict(overrides: str) -> None:
    found = compose(overrides.split())
    assert config.parse(found.to_dict()) == found


def test_demo_and_other_overrides_combine() -> None:
    found = compose(["experiment=demo", "quant=nf4", "model=tiny_llama", "loop.steps=3"])
    assert (found.quant.kind, found.model.kind, found.loop.steps, found.optim.lr) == ("nf4", "tiny_llama", 3, 1e-3)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("optim.lr", 0, "0 is not allowed; a positive number."),
        ("optim.lr", "fast", "'fast' is not allowed; a positive number."),
        ("optim.lr", float("nan"), "nan is not allowed; a positive number."),
        ("optim.weight_decay", -0.1, "-0.1 is not allowed; a number, 0 or more."),
        ("optim.betas", [0.9], "[0.9] is not allowed; two numbers, each from 0 up to, but not including, 1."),
        ("optim.eps", 0.0, "0.0 is not allowed; a positive number."),
        ("loop.steps", 0, "0 is not allowed; a positive integer, or null."),
        ("loop.steps", "ten", "'ten' is not allowed; a positive integer, or null."),
        ("loop.steps", 2.0, "2.0 is not allowed; a positive integer, or null."),
        ("loop.steps", True, "true is not allowed; a positive integer, or null."),
        ("loop.epochs", -1, "-1 is not allowed; a positive number, or null."),
        ("loop.micro_batch", 0, "0 is not allowed; a positive integer, or null."),
        ("loop.accumulate", 0, "0 is not allowed; a positive integer."),
        ("loop.accumulate", None, "null is not allowed; a positive integer."),
        ("loop.max_grad_norm", 0, "0 is not allowed; a positive number (.inf measures without clipping)."),
        ("loop.precision", "fp61", "'fp61' is not allowed; one of auto, fp32, bf16, fp16. Did you mean 'fp16'?"),
        ("loop.device", "gpu", "'gpu' is not allowed; auto, cpu, cuda or cuda:N. Did you mean 'cpu'?"),
        ("loop.device", "cuda:", "'cuda:' is not allowed; auto, cpu, cuda or cuda:N. Did you mean 'cuda'?"),
        ("loop.seed", -1, "-1 is not allowed; an integer, 0 or more."),
        (
            "loop.gradient_checkpointing",
            "blok",
            "'blok' is not allowed; one of off, block, selective. Did you mean 'block'?",
        ),
        ("loop.gradient_checkpointing", 1, "1 is not allowed; one of off, block, selective."),
        ("loop.offload", True, "true is not allowed; false, unless loop.gradient_checkpointing=block."),
        ("schedule.warmup", -1, "-1 is not allowed; a number of steps, or a fraction below 1."),
        ("schedule.warmup", 1.5, "1.5 is not allowed; a number of steps, or a fraction below 1."),
        ("schedule.options", [1], "[1] is not allowed; a mapping."),
        ("data.eval_fraction", 1, "1 is not allowed; a number between 0 and 1, both excluded."),
        ("data.eval_fraction", 0, "0 is not allowed; a number between 0 and 1, both excluded."),
        ("data.max_length", 1, "1 is not allowed; an integer, 2 or more."),
        ("data.limit", 0, "0 is not allowed; a positive integer, or null."),
        ("data.train_on", "respons", "'respons' is not allowed; one of response, all. Did you mean 'response'?"),
        ("data.on_empty", "skip", "'skip' is not allowed; one of error, drop."),
        ("data.template", "chatt", "'chatt' is not allowed; one of instruction, chat, plain. Did you mean 'chat'?"),
        ("eval.every", -1, "-1 is not allowed; an integer, 0 or more."),
        ("eval.generate.temperature", 0, "0 is not allowed; a positive number."),
        ("eval.generate.top_p", 0, "0 is not allowed; a number above 0, up to and including 1."),
        ("eval.generate.top_p", 1.1, "1.1 is not allowed; a number above 0, up to and including 1."),
        ("eval.generate.num_return_sequences", 2, "2 is not allowed; 1, unless eval.generate.do_sample=true."),
        ("checkpoint.keep", 0, "0 is not allowed; a positive integer."),
        (
            "checkpoint.allow",
            "data",
            "'data' is not allowed; a list of what may differ on resume, such as [optim.lr, data].",
        ),
        (
            "model.kind",
            "lama",
            "'lama' is not allowed; one of smollm2, hf, tiny_llama, tiny_gpt2. Did you mean 'tiny_llama'?",
        ),
        ("model.dtype", "fp16", "'fp16' is not allowed; one of auto, fp32, bf16. Did you mean 'bf16'?"),
        ("quant.compute_dtype", "int8", "'int8' is not allowed; one of fp32, bf16, fp16, or null."),
        (
            "adapter.targets",
            [],
            "[] is not allowed; a pattern, a list of patterns or a mapping of patterns to options.",
        ),
        ("adapter.r", 0, "0 is not allowed; a positive integer."),
        ("adapter.dropout", 1.0, "1.0 is not allowed; a number from 0 up to, but not including, 1."),
        ("loop", 3, "3 is not allowed; a mapping of its keys."),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(
    tree: dict[str, Any], path: str, value: Any, said: str
) -> None:
    assert refusal(put(tree, path, value)) == f"{path}: {said}"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("loop.max_grad_norm", float("inf")),
        ("loop.max_grad_norm", ".inf"),
        ("schedule.warmup", 10),
        ("schedule.warmup", 0.99),
        ("loop.device", "cuda:3"),
        ("eval.generate.limit", 0),
        ("checkpoint.every", 0),
        ("eval.generate.top_p", 1),
        ("adapter.targets", ["q_proj", "*.v_proj"]),
        ("optim.groups", [{"match": "*.B", "lr": 3e-3, "weight_decay": 0}]),
        ("optim.groups", [{"match": "*.B", "lr_ratio": 0.5}]),
    ],
)
def test_the_edges_of_what_is_allowed_are_allowed(tree: dict[str, Any], path: str, value: Any) -> None:
    config.parse(put(tree, path, value))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("lop", "unknown key. Did you mean 'loop'? Allowed: model, quant, adapter, data, optim,"),
        ("loop.step", "unknown key. Did you mean 'steps'? Allowed: steps, epochs,"),
        ("optim.lrr", "unknown key. Did you mean 'lr'? Allowed: lr, weight_decay, groups, in_backward, betas,"),
        (
            "adapter.rr",
            "unknown key. Did you mean 'r'? Allowed: targets, exclude, r, alpha, dropout, rslora, init, freeze_a.",
        ),
        ("data.fields.reply", "unknown key. Allowed: instruction, input, response, text."),
        ("eval.generate.topp", "unknown key. Did you mean 'top_p'? Allowed: limit,"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_and_the_allowed(tree: dict[str, Any], path: str, said: str) -> None:
    assert refusal(put(tree, path, 1)).startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loop.epochs": 1}, "loop.steps: 100 is not allowed; exactly one of loop.steps and loop.epochs"),
        ({"loop.steps": None}, "loop.steps: null is not allowed; exactly one of loop.steps and loop.epochs"),
        ({"loop.micro_batch_tokens": 512}, "loop.micro_batch: 8 is not allowed; exactly one of loop.micro_batch and"),
        ({"model.name": "gpt2"}, "model.name: only with model=hf."),
        ({"model.kind": "hf"}, "model.name: null is not allowed; a folder or a hub id."),
        ({"quant.double": False}, "quant.double: only with quant=nf4."),
        ({"data.path": "x"}, "data.path: only with data=jsonl or data=csv."),
        ({"data.kind": "csv"}, "data.path: null is not allowed; a file."),
        ({"data.fields.response": "x"}, "data.fields: only with data=jsonl or data=csv."),
        (
            {"data.kind": "csv", "data.path": "x", "data.template": "plain", "data.fields.text": None},
            "data.fields.text: null is not allowed; a column's name, because data.template=plain.",
        ),
        ({"optim.groups": [{"lr": 1}]}, "optim.groups[0].match: missing; a pattern of parameter names, such as '*.B'."),
        ({"optim.groups": [{"match": "a", "lr": 0}]}, "optim.groups[0].lr: 0 is not allowed; a positive number."),
        (
            {"optim.groups": [{"match": "a", "lr": 1e-3, "lr_ratio": 16}]},
            "optim.groups[0].lr_ratio: 16 is not allowed; either lr or lr_ratio, which is times optim.lr.",
        ),
        (
            {"optim.groups": [{"match": "a", "lr_ratio": 0}]},
            "optim.groups[0].lr_ratio: 0 is not allowed; a positive number.",
        ),
        ({"optim.groups": [{"mtch": "a"}]}, "optim.groups[0].mtch: unknown key. Did you mean 'match'?"),
        ({"model.kind": "???"}, "model.kind: missing; one of smollm2, hf, tiny_llama, tiny_gpt2. Write model.kind=…."),
        ({"loop.seed": "${data.sed}"}, "loop.seed: Interpolation key 'data.sed' not found."),
        ({"loop": None}, "loop: missing; choose one, or give a mapping of its keys."),
    ],
)
def test_keys_that_contradict_each_other_are_refused(tree: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    for path, value in changes.items():
        put(tree, path, value)
    assert refusal(tree).startswith(said)


def test_a_users_adapter_brings_its_own_options_and_ranges(tree: dict[str, Any]) -> None:
    own = {"_target_": f"{__name__}.Scaled", "targets": "all-linear"}
    found = config.parse(tree | {"adapter": own | {"size": 3}})
    assert found.adapter.options == {"size": 3}
    assert refusal(tree | {"adapter": own | {"size": 0}}) == "adapter.size: 0 is not allowed; a positive integer."
    said = refusal(tree | {"adapter": own | {"sise": 1}})
    assert said == "adapter.sise: unknown key. Did you mean 'size'? Allowed: targets, exclude, size, scale."


def test_overrides_of_a_pattern_are_checked_like_options(tree: dict[str, Any]) -> None:
    put(tree, "adapter.targets", {"*.q_proj": {"rr": 1}})
    assert refusal(tree).startswith("adapter.targets['*.q_proj'].rr: unknown key. Did you mean 'r'? Allowed: r, alpha")
    put(tree, "adapter.targets", {"*.q_proj": None, "*.v_proj": {"r": 0}})
    assert refusal(tree) == "adapter.targets['*.v_proj'].r: 0 is not allowed; a positive integer."


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("torch.optim.AdamWW", "cannot be imported; torch.optim has no 'AdamWW'. Did you mean 'AdamW'?"),
        ("nowhere.AdamW", "cannot be imported; no module 'nowhere'."),
        ("os.system", "is not allowed; a subclass of torch.optim.optimizer.Optimizer."),
        ("torch.nn.Linear", "is not allowed; a subclass of torch.optim.optimizer.Optimizer."),
        ("AdamW", "is not allowed; a dotted path such as torch.optim.AdamW."),
        ("torch..AdamW", "is not allowed; a dotted path such as torch.optim.AdamW."),
    ],
)
def test_only_a_class_of_the_right_kind_is_resolved(target: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.resolve(target, torch.optim.Optimizer, "optim._target_")
    assert str(caught.value) == f"optim._target_: '{target}' {said}"


def test_what_fails_inside_an_imported_module_stays_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_adapter.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        config.resolve("broken_adapter.X", Adapter, "adapter._target_")


def test_importing_the_schema_imports_no_torch() -> None:
    code = "import sys, lowrank.config, lowrank.compose; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_field_has_a_rule_and_every_rule_a_field() -> None:
    def paths(cls: type, where: str) -> set[str]:
        hints = get_type_hints(cls)
        found: set[str] = set()
        for f in fields(cls):
            name = {"target": "_target_"}.get(f.name, f.name)
            inner = is_dataclass(hints[f.name])
            found |= paths(hints[f.name], f"{where}.{name}") if inner else {f"{where}.{name}"}
        return found

    options = {"adapter.options", "optim.options"}
    schema = {path for name, cls in GROUPS.items() for path in paths(cls, name)} - options
    extra = {"optim.betas", "optim.eps", "optim.momentum", *(p for p in RULES if p.startswith("optim.groups."))}
    assert schema == set(RULES) - extra


def test_every_key_is_documented_where_it_stands() -> None:
    undocumented = []
    for path in sorted(find_conf().glob("*/*.yaml")):
        if path.parent.name in ("experiment", "hydra"):
            continue
        lines = path.read_text().splitlines()
        for before, line in zip(["", *lines], lines, strict=False):
            is_key = line.strip() and not line.lstrip().startswith("#")
            if is_key and "#" not in line and not before.lstrip().startswith("#"):
                undocumented.append(f"{path.name}: {line}")
    assert undocumented == []


@pytest.mark.parametrize("damage", [b"loop: {", b"loop:\n\tsteps: 1", b"- loop", b"\xff\xfe", b"a: \x07", b"[" * 5000])
def test_a_run_directorys_file_that_cannot_be_read_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(damage)
    with pytest.raises(RefusedError, match=r"config\.yaml: cannot be read"):
        config.load(tmp_path / "config.yaml")
