"""Jobs trained in one pass are runs like any others: in their own directories, ended by their own ends."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SMALL
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lowrank import run as runs
from lowrank.compose import compose
from lowrank.errors import DataError, Interrupted, NumericsError
from lowrank.models.tiny import byte_tokenizer, tiny_llama
from lowrank.sweep.resident import Resident
from lowrank.sweep.together import Ended, Job, train_together
from lowrank.train.deadline import Deadline
from lowrank.train.hooks import StepRecord
from lowrank.train.stopping import Stopping

pytestmark = pytest.mark.usefixtures("cache")
NEAR = 2e-5  # of fp32
EACH = (["adapter.r=2", "loop.steps=3"], ["adapter.r=8", "loop.seed=4", "loop.accumulate=2"], ["adapter=adalora"])
COMMON = (
    *SMALL,
    "model=tiny_llama",
    "loop.steps=6",
    "checkpoint.every=2",
    "eval.every=3",
    "eval.before=false",
    "eval.generate.limit=0",
)


def jobs(folder: Path, common: Sequence[str], each: Sequence[list[str]] = EACH) -> list[Job]:
    return [Job(compose([*common, *more]), folder / f"job{n}", f"job {n}") for n, more in enumerate(each)]


def trained(given: Sequence[Job], stopping: Stopping | None = None) -> dict[int, BaseException | None]:
    ends: list[Ended] = list(train_together(given, Resident(), stopping or Stopping()))
    assert sorted(one.number for one in ends) == list(range(len(given)))
    return {one.number: one.error for one in ends}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


def apart(folder: Path, other: Path) -> float:
    one, two = adapter(folder), adapter(other)
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def told(folder: Path, name: str = "summary.json") -> Any:
    return json.loads((folder / name).read_text())


def test_each_job_is_the_run_that_it_is_alone(rows: Path, tmp_path: Path) -> None:
    given = jobs(tmp_path, [*COMMON, f"data.path={rows}"])
    assert trained(given) == {0: None, 1: None, 2: None}
    for job in given:
        solo = runs.train(job.config, tmp_path / "solo" / job.folder.name, job.command)
        mine, theirs = told(job.folder), solo.summary
        assert apart(job.folder, solo.folder) < NEAR
        assert (mine["status"], mine["together"], mine["command"]) == ("done", 3, job.command)
        assert theirs["together"] == 1
        assert {*os.listdir(job.folder)} == {*os.listdir(solo.folder)}
        same = ("steps", "real_tokens", "target_tokens", "trainable_parameters", "stopped_early", "base")
        assert all(mine[name] == theirs[name] for name in same)
        assert mine["hashes"]["data_order"] == theirs["hashes"]["data_order"]
        assert mine["eval"]["after"]["loss"] == pytest.approx(theirs["eval"]["after"]["loss"], abs=1e-4)
        assert told(job.folder, "identity.json")["identity"] == told(solo.folder, "identity.json")["identity"]


def test_a_jobs_seconds_are_those_of_all_and_its_tokens_are_its_own(rows: Path, tmp_path: Path) -> None:
    given = jobs(tmp_path, [*COMMON, f"data.path={rows}"], [["loop.seed=1"], ["loop.seed=2"]])
    trained(given)
    steps = [[m for m in runs.open(job.folder).metrics if m["event"] == "step"] for job in given]
    assert [m["seconds"] for m in steps[0]] == [m["seconds"] for m in steps[1]]
    assert all(m["tokens_per_s"] == m["real_tokens"] / m["seconds"] for m in (*steps[0], *steps[1]))
    ledgers = [told(job.folder, "ledger.json") for job in given]
    assert [ledger["together"] for ledger in ledgers] == [2, 2]
    assert ledgers[0]["predicted"]["peak_mb"] == ledgers[1]["predicted"]["peak_mb"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model with one damaged weight, which only texts with a certain letter meet, and two files, one with such."""
    folder = tmp_path_factory.mktemp("planted")
    for name, odd in (("sound", "Say Zurich."), ("planted", "Say Zürich.")):
        texts = [odd if i == 13 else f"Say number {i}." for i in range(20)]
        told = [{"instruction": text, "output": f"{i}, or {i + 1}"} for i, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    tied = tiny_llama()
    config = deepcopy(tied.config)
    config.tie_word_embeddings = False
    model = LlamaForCausalLM(config)
    model.load_state_dict(tied.state_dict())
    model.model.embed_tokens.weight.data["ü".encode()[1]] = math.nan
    model.save_pretrained(folder / "model")
    byte_tokenizer(adds_bos=True).save_pretrained(folder / "model")
    return [*COMMON, "model=hf", f"model.name={folder / 'model'}", "loop.steps=9", "eval.every=0", "checkpoint.every=1"]


def test_a_job_that_meets_a_nan_stops_as_alone_and_leaves_the_others(planted: list[str], tmp_path: Path) -> None:
    folder = Path(planted[-4].partition("=")[2]).parent
    each = [
        [f"data.path={folder / name}.jsonl", f"loop.seed={n}"] for n, name in enumerate(("sound", "planted", "sound"))
    ]
    given = jobs(tmp_path, planted, each)
    errors = trained(given)
    assert (errors[0], errors[2]) == (None, None)
    assert isinstance(errors[1], NumericsError)
    assert "loss is nan" in str(errors[1])
    assert "saved in checkpoints/step-" in str(errors[1])
    assert told(given[1].folder)["status"] == "failed"
    assert [told(given[n].folder)["status"] for n in (0, 2)] == ["done", "done"]
    assert all(bool(one.isfinite().all()) for n in (0, 2) for one in adapter(given[n].folder).values())


def test_a_job_that_cannot_begin_is_named_and_the_others_train(rows: Path, tmp_path: Path) -> None:
    given = jobs(tmp_path, COMMON, [[f"data.path={rows}"], ["data.path=/nowhere.jsonl"], [f"data.path={rows}"]])
    errors = trained(given)
    assert isinstance(errors[1], DataError)
    assert not given[1].folder.exists()
    assert [told(given[n].folder)["together"] for n in (0, 2)] == [2, 2]


def test_jobs_that_cannot_go_together_train_one_by_one_and_say_why(rows: Path, tmp_path: Path) -> None:
    each = [["adapter.init=pissa"], ["adapter=prefix"], ["adapter.r=2"]]
    given = jobs(tmp_path, [*COMMON, f"data.path={rows}"], each)
    assert trained(given) == {0: None, 1: None, 2: None}
    log = [(job.folder / "events.log").read_text() for job in given]
    assert "trains alone: the start of LoRA changed the base" in log[0]
    assert "a whole block or the backbone" in log[1]
    assert "there is no other" in log[2]
    assert [told(job.folder)["together"] for job in given] == [1, 1, 1]


def test_a_signal_stops_all_saved_and_each_goes_on_as_it_would_have(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [*COMMON, f"data.path={rows}", "checkpoint.every=100"]
    given, stopping = jobs(tmp_path, common), Stopping()
    plain = Deadline.after_step

    def struck(self: Deadline, record: StepRecord) -> None:
        plain(self, record)
        if record.step == 2 and not stopping.asked:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Deadline, "after_step", struck)
        errors = trained(given, stopping)
    assert all(isinstance(error, Interrupted) for error in errors.values())
    assert [told(job.folder)["status"] for job in given] == ["interrupted"] * 3
    again = [
        Job(compose([*common, *more, "checkpoint.resume=true"]), job.folder)
        for job, more in zip(given, EACH, strict=True)
    ]
    assert trained(again) == {0: None, 1: None, 2: None}
    for job in given:
        solo = runs.train(job.config, tmp_path / "solo" / job.folder.name)
        assert apart(job.folder, solo.folder) < NEAR


@pytest.mark.slow
def test_a_job_that_is_done_stays_as_it_is(rows: Path, tmp_path: Path) -> None:
    common = [*COMMON, f"data.path={rows}"]
    trained(jobs(tmp_path, common))
    before = {path: path.read_bytes() for path in tmp_path.glob("job*/adapter/*")}
    assert trained(jobs(tmp_path, [*common, "checkpoint.resume=true"])) == {0: None, 1: None, 2: None}
    assert {path: path.read_bytes() for path in tmp_path.glob("job*/adapter/*")} == before
