"""What a resume refuses, by its name, with nothing changed; and what it does where the same is allowed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SMALL, write_rows

from lowrank import compose, run
from lowrank.errors import ConfigError, LowrankError, RefusedError
from lowrank.models import tiny
from lowrank.run import Run
from lowrank.schema import Config
from lowrank.train import checkpoint

OWN = """
import torch
from lowrank.adapters import LoRA
class Own(LoRA):
    '''LoRA.'''
class Optimizer(torch.optim.AdamW):
    '''AdamW.'''
"""
RESUME = "checkpoint.resume=true"


@dataclass(frozen=True)
class Drift:
    """Overrides that change a run, the fields that a refusal names, and whether it can go on where they may."""

    overrides: tuple[str, ...]
    fields: tuple[str, ...]
    misfit: str = ""  # what does not fit, where it cannot


DRIFTS = {
    "lr": Drift(("optim.lr=1e-3",), ("optim.lr",)),
    "betas": Drift(("optim.betas=[0.8,0.99]",), ("optim.betas",)),
    "weight decay": Drift(("optim.weight_decay=0.1",), ("optim.weight_decay",)),
    "groups": Drift(("optim.groups=[{match: '*.B', lr: 1e-2}]",), ("optim.groups",)),
    "optimizer": Drift(("optim=sgd", "optim.lr=5e-4"), ("optim._target_", "optim.betas", "optim.eps")),
    "own optimizer": Drift(("optim._target_=own_drift.Optimizer",), ("optim._target_", "code")),
    "schedule": Drift(("schedule=cosine",), ("schedule.kind",)),
    "warm-up": Drift(("schedule.warmup=2",), ("schedule.warmup",)),
    "accumulation": Drift(("loop.accumulate=2",), ("loop.accumulate",)),
    "micro-batch": Drift(("loop.micro_batch=1",), ("loop.micro_batch",)),
    "micro-batch in tokens": Drift(
        ("loop.micro_batch=null", "loop.micro_batch_tokens=99"), ("loop.micro_batch", "loop.micro_batch_tokens")
    ),
    "packing": Drift(("loop.packing=in_order",), ("loop.packing",)),
    "clip": Drift(("loop.max_grad_norm=.inf",), ("loop.max_grad_norm",)),
    "precision": Drift(("loop.precision=bf16",), ("loop.precision", "model.dtype", "base")),
    "half precision": Drift(("loop.precision=fp16",), ("loop.precision",)),
    "seed": Drift(("loop.seed=1",), ("loop.seed",)),
    "average": Drift(("loop.average=0.9",), ("loop.average",)),
    "recomputing": Drift(("loop.gradient_checkpointing=true",), ("loop.gradient_checkpointing",)),
    "kernels": Drift(("loop.fast=false",), ("loop.fast", "fast")),
    "quantised": Drift(("quant=nf4",), ("quant.kind", "base", "plan")),
    "held in bf16": Drift(("model.dtype=bf16",), ("model.dtype", "base")),
    "dropout": Drift(("adapter.dropout=0.1",), ("adapter.dropout", "plan")),
    "alpha": Drift(("adapter.alpha=8",), ("adapter.alpha", "plan")),
    "rank": Drift(("adapter.r=4",), ("adapter.r", "plan"), "down_proj.adapter.A is (2, 128) in the checkpoint and (4"),
    "targets": Drift(
        ("adapter.targets=[q_proj]",), ("adapter.targets", "plan"), "mlp.down_proj.adapter.A is (2, 128) in the checkp"
    ),
    "own class": Drift(("adapter._target_=own_drift.Own",), ("adapter._target_", "plan", "code")),
    "another model": Drift(
        ("model=tiny_gpt2",),
        ("model.kind", "tokenizer", "architecture", "base", "plan", "fast"),
        "adapter.A is (2, 128) in the checkpoint and not there",
    ),
    "data content": Drift(("data.path=other.jsonl",), ("data",)),
    "data limit": Drift(("data.limit=9",), ("data.limit",)),
    "data seed": Drift(("data.seed=1",), ("data.seed",)),
    "held-out part": Drift(("data.eval_fraction=0.2",), ("data.eval_fraction",)),
    "template": Drift(("data.template=chat",), ("data.template",)),
    "truncation": Drift(("data.max_length=500",), ("data.max_length",)),
    "trained on": Drift(("data.train_on=all",), ("data.train_on",)),
}


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data, other data, a module of the user's own, and a run of four steps."""
    home = tmp_path_factory.mktemp("home")
    write_rows(home / "rows.jsonl")
    write_rows(home / "other.jsonl", 21)
    (home / "own_drift.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home))
        patch.chdir(home)
        go(home / "run")
        yield home


@lru_cache
def composed() -> Config:
    brief = ("model=tiny_llama", "loop.steps=4", "checkpoint.every=2", "eval.before=false", "eval.generate.limit=0")
    return compose.compose([*SMALL, *brief, "adapter.r=2", "data.path=rows.jsonl"])


def go(folder: Path, *overrides: str) -> Run:
    """What ``lowrank.train`` does, with Hydra asked once for what all these runs have in common."""
    return run.train(compose.changed(composed(), [*overrides]), folder)


@pytest.fixture
def folder(home: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(home / "run", tmp_path / "run"))


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("events.log", ".lock")]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def refused(folder: Path, *overrides: str, error: type[LowrankError] = RefusedError) -> str:
    """What is said; nothing has changed but the log, which has it too."""
    before = content(folder)
    with pytest.raises(error) as caught:
        go(folder, RESUME, *overrides)
    assert content(folder) == before
    if error is RefusedError:
        assert (folder / "events.log").read_text().splitlines()[-1].endswith(f" {caught.value}")
    return str(caught.value)


def elsewhere(folder: Path, **fields: Any) -> None:
    """As if the checkpoints had been made where these fields of the identity, with __ for a dot, were others."""
    then = {name.replace("__", "."): value for name, value in fields.items()}
    for path in checkpoint.committed(folder / "checkpoints"):
        found = checkpoint.read(path)
        state = {**found.state, "identity": {**found.state["identity"], **then}}
        shutil.rmtree(path)
        checkpoint.save(path.parent, state["loop"]["step"], checkpoint.Saved(found.tensors, state))


QUICK = ("lr", "optimizer", "precision", "quantised", "rank", "data content", "own class")


def named(said: str) -> list[str]:
    """The fields of a refusal, which are those it says are to be allowed."""
    what, _, advice = said.removeprefix("resume refused: ").partition(". To accept: 'checkpoint.allow=[")
    fields = [one.partition(" ")[0] for one in what.split("; ")]
    assert advice == f"{','.join(fields)}]'."
    return fields


@pytest.mark.parametrize("drift", DRIFTS.values(), ids=DRIFTS)
def test_what_changes_a_run_is_refused_by_name(folder: Path, drift: Drift) -> None:
    said = refused(folder, *drift.overrides)
    assert said.startswith("resume refused: ")
    assert set(drift.fields) == set(named(said)) - {"optim.momentum", "optim.nesterov"}


@pytest.mark.parametrize(
    "drift",
    [pytest.param(drift, id=name, marks=[pytest.mark.slow] * (name not in QUICK)) for name, drift in DRIFTS.items()],
)
def test_what_is_allowed_goes_on_or_says_what_does_not_fit(folder: Path, drift: Drift) -> None:
    allow = f"checkpoint.allow=[{','.join(named(refused(folder, *drift.overrides)))}]"
    if drift.misfit:
        said = refused(folder, *drift.overrides, allow, "loop.steps=5")
        assert drift.misfit in said
        assert said.endswith("which cannot be allowed. Begin anew in another directory.")
        return
    done = go(folder, RESUME, *drift.overrides, allow, "loop.steps=5")
    assert (done.summary["status"], done.summary["steps"]) == ("done", 5)
    assert refused(folder, "loop.steps=5").startswith("resume refused: ")  # it is a run of the other kind now


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ({"versions__torch": "2.0"}, "versions.torch 2.0 → "),
        ({"versions__python": "3.9"}, "versions.python 3.9 → "),
        ({"loop__device": "cuda"}, "loop.device cuda → cpu"),
        ({"machine": "x86_64 AVX2"}, "machine x86_64 AVX2 → "),
        ({"code": "0" * 64}, "code sha256 differs"),
        ({"packed": False}, "packed false → true"),
        ({"tokenizer": "0" * 64}, "tokenizer sha256 differs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_machine_version_or_code_is_refused(folder: Path, then: dict[str, Any], said: str) -> None:
    elsewhere(folder, **then)
    assert f"resume refused: {said}" in refused(folder)
    [name] = then
    if name not in ("code", "versions__torch"):
        return
    done = go(folder, RESUME, f"checkpoint.allow=[{name.partition('__')[0]}]", "loop.steps=5")
    assert done.summary["steps"] == 5


def test_another_thread_count_is_refused(folder: Path) -> None:
    count = torch.get_num_threads()
    torch.set_num_threads(count + 1)
    try:
        assert refused(folder).startswith(f"resume refused: threads {count} → {count + 1}. To accept:")
    finally:
        torch.set_num_threads(count)


@pytest.mark.parametrize(
    ("file", "change", "field"),
    [
        ("config.json", {"rms_norm_eps": 1e-5}, "architecture"),
        ("tokenizer_config.json", {"pad_token": "<|eos|>"}, "tokenizer"),
        ("chat_template.jinja", {"any": "text"}, "tokenizer"),
    ],
)
def test_a_model_that_was_edited_in_its_place_is_refused(
    home: Path, tmp_path: Path, file: str, change: dict[str, Any], field: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.folder("tiny_llama"), model)
    given = ("model=hf", f"model.name={model}")
    go(tmp_path / "run", *given)
    moved = model.rename(tmp_path / "moved")
    go(tmp_path / "run", RESUME, "model=hf", f"model.name={moved}")  # the same by its content
    is_json = file.endswith(".json")
    before = json.loads((moved / file).read_text()) if is_json else {}
    (moved / file).write_text(json.dumps({**before, **change}))
    said = refused(tmp_path / "run", "model=hf", f"model.name={moved}")
    assert said == f"resume refused: {field} sha256 differs. To accept: 'checkpoint.allow=[{field}]'."


def test_an_own_class_that_was_edited_is_refused(home: Path, tmp_path: Path) -> None:
    own = "adapter._target_=own_drift.Own"
    go(tmp_path / "run", own)
    (home / "own_drift.py").write_text(f"{OWN}# edited\n")
    try:
        assert refused(tmp_path / "run", own).startswith("resume refused: code sha256 differs. To accept:")
    finally:
        (home / "own_drift.py").write_text(OWN)


def test_every_field_that_differs_is_named_and_each_must_be_allowed(folder: Path) -> None:
    given = ("optim.lr=1e-3", "data.path=other.jsonl", "loop.seed=7")
    fields = "loop.seed 0 → 7; data sha256 differs"
    assert refused(folder, *given) == (
        f"resume refused: optim.lr 0.0005 → 0.001; {fields}. To accept: 'checkpoint.allow=[optim.lr,loop.seed,data]'."
    )
    assert refused(folder, *given, "checkpoint.allow=[optim]").startswith(f"resume refused: {fields}. To accept: ")


def test_what_only_looks_or_ends_a_run_is_free(folder: Path) -> None:
    free = ("eval.every=1", "eval.limit=1", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.background=true")
    more = ("loop.max_seconds=1e6", "loop.on_nonfinite=skip", "loop.trace_nonfinite=true", "loop.patience=50")
    done = go(folder, RESUME, *free, *more, "loop.max_skipped=3", "loop.steps=6")
    assert (done.summary["status"], done.summary["steps"]) == ("done", 6)
    assert [path.name for path in checkpoint.committed(folder / "checkpoints")][-1] == "step-00000006"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("optim.lrr", "Did you mean 'optim.lr'?"), ("lr", ""), ("dta", "Did you mean 'data'?"), ("all", "")],
)
def test_an_unknown_name_in_allow_is_a_configuration_error(folder: Path, name: str, hint: str) -> None:
    said = refused(folder, f"checkpoint.allow=[{name}]", error=ConfigError)
    assert said.startswith(f"checkpoint.allow: '{name}' is nothing that a run's numbers depend on.")
    assert said.endswith(hint)
    with pytest.raises(ConfigError):
        go(folder.with_name("new"), f"checkpoint.allow=[{name}]")
    assert not os.path.exists(folder.with_name("new"))
