"""A run whose data meet a NaN: one row holds the only text with a certain byte, whose embedding is NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SMALL, train
from transformers import LlamaForCausalLM

import lowrank
from lowrank.adapters import store
from lowrank.errors import NumericsError
from lowrank.models.tiny import byte_tokenizer, tiny_llama

LINE = 27  # of the file, in which every second line is blank
RUN = ("loop.accumulate=2", "loop.steps=12", "checkpoint.every=1", "checkpoint.keep=20", "eval.before=false")
UNTIMED = ("event", "step", "loss", "lr", "grad_norm", "real_tokens", "what", "micro_batch", "rows", "spike")
SKIP = "loop.on_nonfinite=skip"


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model with one damaged weight, and a file in which line 27 alone meets it."""
    folder = tmp_path_factory.mktemp("planted")
    texts = [f"Say number {i}." if 2 * i + 1 != LINE else "Say Zürich." for i in range(20)]
    rows = [{"instruction": text, "output": f"{i}, or {i + 1}"} for i, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    tied = tiny_llama()
    config = deepcopy(tied.config)
    config.tie_word_embeddings = False  # the head must not have the NaN too
    model = LlamaForCausalLM(config)
    model.load_state_dict(tied.state_dict())
    model.model.embed_tokens.weight.data["ü".encode()[1]] = math.nan
    model.save_pretrained(folder / "model")
    byte_tokenizer(adds_bos=True).save_pretrained(folder / "model")
    return [*SMALL, *RUN, "model=hf", f"model.name={folder / 'model'}", f"data.path={folder / 'rows.jsonl'}"]


@pytest.fixture(scope="module")
def trained(overrides: list[str]) -> Callable[..., Any]:
    return lambda folder, *more: lowrank.train([*overrides, *more], folder)


@pytest.fixture(scope="module")
def skipped(trained: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(tmp_path_factory.mktemp("skipped") / "run", SKIP)


def rows_of(run: Any) -> list[dict[str, Any]]:
    return [{k: row[k] for k in UNTIMED if k in row} for row in run.metrics if row["event"] != "eval"]


def test_the_run_stops_names_the_line_and_leaves_the_step_before(
    overrides: list[str], skipped: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first = next(row for row in skipped.metrics if row["event"] == "skipped")
    done = train(*overrides, "loop.trace_nonfinite=true", f"hydra.run.dir={folder}")
    step = first["step"]
    assert done.returncode == 5
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"step {step}: loss is nan in micro-batch {first['micro_batch']} of 2 (rows ")
    assert str(LINE) in last
    assert "First not finite: the output of model.embed_tokens." in last
    assert "model.embed_tokens.weight, which does not train, is not finite." in last
    assert last.endswith(f"Parameters are those of step {step - 1}, saved in checkpoints/step-{step - 1:08d}.")
    assert not (folder / "adapter").exists()
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*"))[-1] == f"step-{step - 1:08d}"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["error"], summary["steps"]) == ("failed", last, step - 1)


def test_skipping_is_counted_told_and_takes_no_step_away(skipped: Any) -> None:
    told = [row for row in skipped.metrics if row["event"] == "skipped"]
    assert [row["step"] for row in skipped.metrics if row["event"] == "step"] == list(range(1, 13))
    assert skipped.summary["skipped_steps"] == len(told) >= 2  # once an epoch
    assert all(LINE in row["rows"] and row["what"] == "loss is nan" for row in told)
    assert (skipped.summary["status"], skipped.summary["steps"]) == ("done", 12)
    assert all(torch.isfinite(tensor).all() for tensor in store.read(skipped.folder / "adapter")[1].values())
    assert "This batch is skipped." in (skipped.folder / "events.log").read_text()


@pytest.mark.parametrize("after", [-1, 0], ids=["before it", "after it"])
def test_a_run_that_skips_resumes_to_the_same_bits(
    after: int, trained: Callable[..., Any], skipped: Any, tmp_path: Path
) -> None:
    """Stopped by its budget at each step in turn, so that the skip lies before, at and behind a resume."""
    folder = tmp_path / "run"
    first = next(row["step"] for row in skipped.metrics if row["event"] == "skipped")
    for step in range(1, first + after + 1):
        trained(folder, SKIP, "loop.max_seconds=1e-6", *(["checkpoint.resume=true"] if step > 1 else []))
    resumed = trained(folder, SKIP, "checkpoint.resume=true")
    assert rows_of(resumed) == rows_of(skipped)
    assert resumed.summary["skipped_steps"] == skipped.summary["skipped_steps"]
    one, other = (store.read(run.folder / "adapter")[1] for run in (resumed, skipped))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stopped_run_goes_on_where_skipping_is_allowed(
    trained: Callable[..., Any], skipped: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(NumericsError):
        trained(folder)
    assert rows_of(trained(folder, SKIP, "checkpoint.resume=true")) == rows_of(skipped)


def test_weights_that_an_update_spoilt_are_never_saved(trained: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(NumericsError) as caught:
        trained(folder, "optim.eps=1e-300", SKIP)  # in fp32 it is 0, and LoRA's A has no gradient at first: 0/0
    said = str(caught.value)
    assert said.startswith("step 1: parameters are not finite after the update at learning rate ")
    assert said.endswith(".A is nan, and nothing was saved; there is no checkpoint.")
    assert not (folder / "adapter").exists()
    assert not list((folder / "checkpoints").glob("step-*"))
    assert lowrank.open(folder).summary["status"] == "failed"
