"""A run that was stopped and goes on ends in the same bits, rows and files as one that nothing stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import resuming
import torch
from cli import write_rows
from resuming import (
    FP16_OVERFLOWS,
    ROWS,
    SHORT,
    STEPS,
    course,
    differing,
    ended,
    full_disk,
    killed,
    resumed,
    slow_disk,
    stopped,
)
from resuming_adapters import Remembering
from transformers import BloomConfig, BloomForCausalLM

import lowrank
from lowrank.models.tiny import byte_tokenizer
from lowrank.train import checkpoint

DROPOUT = "adapter.dropout=0.1"
ADALORA = ("adapter=adalora", "adapter.init_r=4", "adapter.target_r=2", "adapter.delta_t=1", DROPOUT)
HOOKED = ("adapter._target_=resuming_adapters.Hooked",)
FOUR = "loop.accumulate=4"  # and the last step of an epoch has one micro-batch
CASES = {
    "lora": (DROPOUT, FOUR),
    "lora bf16": (DROPOUT, "loop.precision=bf16", "quant=nf4", FOUR),
    "lora fp16": (DROPOUT, *FP16_OVERFLOWS, "loop.accumulate=2"),
    "lora over a padded model": (DROPOUT, "model=hf", "model.name=BLOOM"),
    "lora recomputed, by tokens": (
        *("loop.micro_batch=null", "loop.micro_batch_tokens=120", "loop.gradient_checkpointing=true"),
        *(DROPOUT, "loop.steps=null", "loop.epochs=1.8"),
    ),
    "lora recomputed in part": (DROPOUT, FOUR, "loop.gradient_checkpointing=selective"),
    "lora plus in 8 bits": (
        *("optim=adamw8bit", "optim.min_8bit_size=16", "optim.groups=[{match:'*.adapter.B',lr_ratio:16}]"),
        *(DROPOUT, "schedule=cosine"),
    ),
    "lora by sgd": ("optim=sgd", "optim.lr=1e-2"),
    "full, with the model's dropout": ("adapter=full", "model=tiny_gpt2", "optim.lr=1e-3", FOUR),
    "adalora": ADALORA,
    "adalora fp16": (*ADALORA, *FP16_OVERFLOWS, FOUR, "quant=nf4"),
    "prefix": ("adapter=prefix", "adapter.hidden=8", FOUR),
    "a hook of a user's own": HOOKED,
}


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.path={write_rows(tmp_path_factory.mktemp('data') / 'rows.jsonl', ROWS)}"


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose documents cannot be packed."""
    folder = tmp_path_factory.mktemp("bloom")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        BloomForCausalLM(BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(folder)
    byte_tokenizer(adds_bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, rows: str, bloom: Path) -> Callable[..., tuple[Path, list[str]]]:
    """A run that nothing stopped, made once a case, and its overrides."""
    made: dict[tuple[str, ...], tuple[Path, list[str]]] = {}

    def run(*case: str) -> tuple[Path, list[str]]:
        if case not in made:
            overrides = [*SHORT, rows, *(override.replace("BLOOM", str(bloom)) for override in case)]
            made[case] = (tmp_path_factory.mktemp("whole") / "run", overrides)
            lowrank.train(overrides, made[case][0])
        return made[case]

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_run_whose_process_died_ends_as_the_one_that_did_not(
    case: str, whole: Callable[..., Any], tmp_path: Path
) -> None:
    folder, overrides = whole(*CASES[case])
    resumed(killed(folder, tmp_path / "run", at=3), *overrides)
    assert "resuming after step 3 " in (tmp_path / "run" / "events.log").read_text()
    assert differing(ended(folder), ended(tmp_path / "run")) == []


def test_the_cases_are_of_what_they_say(whole: Callable[..., Any]) -> None:
    def saved(case: str, at: int) -> checkpoint.Saved:
        return checkpoint.read(whole(*CASES[case])[0] / "checkpoints" / f"step-{at:08d}")

    for case in ("lora fp16", "adalora fp16"):
        first, last = (saved(case, at).state["scaler"]["scale"] for at in (1, STEPS))
        assert last < first < 2**16, case
    assert {t.dtype for t in saved("lora plus in 8 bits", 3).tensors["optimizer"].values()} > {torch.uint8}
    assert lowrank.open(whole(*CASES["lora over a padded model"])[0]).summary["packed"] is False
    assert saved("adalora", 3).tensors["hooks"]["0.pruned"].any()


@pytest.mark.parametrize("at", [1, 5, STEPS])
def test_whatever_the_last_step_was(at: int, whole: Callable[..., Any], tmp_path: Path) -> None:
    folder, overrides = whole(*CASES["adalora"])
    resumed(killed(folder, tmp_path / "run", at=at, torn=b""), *overrides)
    assert differing(ended(folder), ended(tmp_path / "run")) == []


def test_a_run_whose_process_died_before_its_first_checkpoint_starts_again(
    whole: Callable[..., Any], tmp_path: Path
) -> None:
    folder, overrides = whole(*CASES["adalora"])
    resumed(killed(folder, tmp_path / "run", at=0), *overrides)
    assert "starting at step 1" in (tmp_path / "run" / "events.log").read_text()
    assert differing(ended(folder), ended(tmp_path / "run")) == []


@pytest.mark.parametrize("how", ["crash", "terminate"])
def test_a_run_that_is_stopped_twice_ends_as_one_that_was_not(
    how: str, whole: Callable[..., Any], tmp_path: Path
) -> None:
    folder, overrides = whole(*CASES["a hook of a user's own"])
    by = getattr(resuming, how)
    stopped(tmp_path, *overrides, after=2, by=by)
    stopped(tmp_path, *overrides, "checkpoint.resume=true", after=3, by=by)
    resumed(tmp_path, *overrides)
    assert differing(ended(folder), ended(tmp_path)) == []


@pytest.mark.parametrize("method", ["before_update", "after_step"])
def test_a_run_whose_hook_raised_ends_as_one_whose_hook_did_not(
    method: str, whole: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, overrides = whole(*CASES["a hook of a user's own"])
    monkeypatch.setattr(Remembering, "raises", {(method, 3)})
    with pytest.raises(RuntimeError, match=f"{method} of step 3"):
        lowrank.train(overrides, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("failed", 2 + (method == "after_step"))
    resumed(tmp_path, *overrides)
    assert differing(ended(folder), ended(tmp_path)) == []


@pytest.mark.parametrize("writes", [12, 445], ids=["early", "late"])
def test_a_run_that_found_the_disk_full_ends_as_one_that_did_not(
    writes: int, whole: Callable[..., Any], tmp_path: Path
) -> None:
    folder, overrides = whole(*CASES["lora by sgd"])
    with pytest.raises(OSError, match="No space left"), full_disk(tmp_path, writes):
        lowrank.train(overrides, tmp_path)
    resumed(tmp_path, *overrides)
    assert differing(ended(folder), ended(tmp_path)) == []


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("eval.every=1", "checkpoint.keep=1"), ("eval.every=0", "eval.generate.limit=0")),
        (("eval.every=0", "checkpoint.every=2", "checkpoint.background=true"), ("eval.every=2", "checkpoint.every=3")),
        (("checkpoint.every=100",), ("checkpoint.background=true", "checkpoint.keep=1", "eval.limit=1")),
    ],
    ids=["evaluations", "checkpoints", "where it saves"],
)
def test_how_often_it_is_looked_at_and_saved_may_change_and_moves_nothing(
    first: tuple[str, ...], then: tuple[str, ...], whole: Callable[..., Any], tmp_path: Path
) -> None:
    folder, overrides = whole(*CASES["a hook of a user's own"])
    stopped(tmp_path, *overrides, *first, after=4, by=resuming.terminate)
    resumed(tmp_path, *overrides, *then)
    watched = ("samples.jsonl", "summary.json: eval", "summary.json: checkpoint")
    moved = [n for n in differing(course(folder), course(tmp_path)) if not n.startswith(watched)]
    assert moved == []


def test_a_checkpoint_that_is_written_while_training_goes_on_is_of_its_own_step(
    whole: Callable[..., Any], tmp_path: Path
) -> None:
    folder, overrides = whole(*CASES["a hook of a user's own"])
    with slow_disk(tmp_path / "checkpoints", 0.005):
        rare = ("checkpoint.background=true", "checkpoint.every=4")
        stopped(tmp_path, *overrides, *rare, after=7, by=resuming.crash)
    resumed(tmp_path, *overrides)
    assert "resuming after step 4 " in (tmp_path / "events.log").read_text()
    assert differing(course(folder), course(tmp_path)) == []


def test_a_run_of_one_step_at_a_time_ends_as_one_of_all(whole: Callable[..., Any], tmp_path: Path) -> None:
    """A budget of time that is always over: seven processes' worth of runs, each of a step."""
    folder, overrides = whole(*CASES["a hook of a user's own"])
    for step in range(1, STEPS + 1):
        run = resumed(tmp_path, *overrides, "loop.max_seconds=1e-9")
        assert run.summary["steps"] == step
        assert run.summary["status"] == ("done" if step == STEPS else "interrupted")
    assert differing(ended(folder), ended(tmp_path)) == []


def test_a_run_that_is_done_stays_as_it_is(whole: Callable[..., Any]) -> None:
    folder, overrides = whole(*CASES["lora by sgd"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "events.log"}
    resumed(folder, *overrides)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "events.log"}
    assert before == after
