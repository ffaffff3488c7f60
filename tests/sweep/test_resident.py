"""A base that stays: every job trains as on one of its own, and leaves nothing behind."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SMALL, write_rows

from lowrank import compose, run
from lowrank.adapters.base import Adapter
from lowrank.adapters.inject import adapter_state
from lowrank.assemble import Parts
from lowrank.errors import NumericsError
from lowrank.ledger.resident import by_part
from lowrank.models.fingerprint import checksum, fingerprint
from lowrank.sweep.resident import KEPT, Resident

pytestmark = pytest.mark.usefixtures("cache")
METHODS = {
    "lora": ("adapter.dropout=0.1",),
    "adalora": ("adapter=adalora", "adapter.init_r=4", "adapter.target_r=2", "adapter.delta_t=1"),
    "prefix": ("adapter=prefix",),
    "full": ("adapter=full", "optim.lr=1e-4"),
}


def config(rows: Path, *overrides: str) -> Any:
    few = ("loop.steps=4", "eval.before=false", "eval.generate.limit=0", "loop.micro_batch=3")
    return compose.compose(["model=tiny_gpt2", *SMALL, *few, f"data.path={rows}", *overrides])


def parts(resident: Resident, rows: Path, *overrides: str) -> Parts:
    return resident.parts(config(rows, *overrides))


def living() -> int:
    """Adapters that are in memory."""
    gc.collect()
    return sum(issubclass(type(thing), Adapter) for thing in gc.get_objects())


def results(done: run.Run) -> tuple[Any, ...]:
    """All of a run that may not depend on where its base comes from."""
    rows = [{k: v for k, v in row.items() if k in ("step", "loss", "norm", "event")} for row in done.metrics]
    file = (done.folder / "adapter" / "adapter.safetensors").read_bytes()
    identity = run.directory.read_json(done.folder / "identity.json")["identity"]
    after = done.summary["eval"]["after"]
    return done.summary["hashes"], done.summary["base"], done.summary["fast"], rows, file, identity, after


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_runs_on_one_base_are_those_on_bases_of_their_own(rows: Path, tmp_path: Path, quant: str) -> None:
    """Of every method against processes of their own: test_worker_exact.py."""
    resident = Resident()
    for name in {"none": ("lora", "full"), "nf4": ("adalora",)}[quant]:
        settings = config(rows, f"quant={quant}", *METHODS[name])
        kept = run.train(settings, tmp_path / f"{name}-kept", made=resident)
        alone = run.train(settings, tmp_path / f"{name}-alone")
        assert results(kept) == results(alone), name
    assert resident.base is not None
    assert checksum(resident.base.loaded.model) == resident.base.sum


def test_each_job_has_modules_of_its_own_over_the_same_tensors(rows: Path) -> None:
    resident = Resident()
    first, second = (resident.load(parts(resident, rows, f"adapter.r={r}")).model for r in (2, 4))

    assert first is not second
    assert [id(p) for p in first.parameters()] == [id(p) for p in second.parameters()]


def test_another_quantisation_or_file_is_another_base(rows: Path, tmp_path: Path) -> None:
    resident = Resident()
    plain = resident.load(parts(resident, rows))
    quantised = resident.load(parts(resident, rows, "quant=nf4"))

    assert plain.hashes != quantised.hashes
    assert resident.held(parts(resident, rows)) == 0  # nothing is kept of a base that is another's
    assert resident.base is None


def test_a_base_that_a_job_has_written_into_is_loaded_anew(rows: Path) -> None:
    resident = Resident()
    first = resident.load(parts(resident, rows))
    clean = fingerprint(first.model)
    next(p for p in first.model.parameters() if p.ndim == 2).data[0, 0] += 1e-3
    assert fingerprint(first.model) != clean

    assert fingerprint(resident.load(parts(resident, rows)).model) == clean


def test_a_change_of_one_number_changes_the_checksum(llama: Any) -> None:
    parameters = [*llama.parameters()]
    before = checksum(llama)
    for parameter in (parameters[0], parameters[-1]):
        kept = parameter.data.clone()
        parameter.data.view(-1)[-1] += 1e-6
        assert checksum(llama) != before
        parameter.data.copy_(kept)
        assert checksum(llama) == before


def test_of_a_finished_job_no_adapter_is_left(rows: Path, tmp_path: Path) -> None:
    before = living()
    resident = Resident()
    run.train(config(rows, *METHODS["prefix"]), tmp_path / "done", made=resident)
    with pytest.raises(NumericsError):
        run.train(config(rows, "optim.lr=1e38"), tmp_path / "failed", made=resident)

    assert living() == before


def test_own_parameters_are_copies_that_the_ledger_counts(rows: Path) -> None:
    resident = Resident()
    full, lora = parts(resident, rows, "adapter=full"), parts(resident, rows)
    assert resident.held(full) == 0
    base = resident.load(lora).model
    shared = resident.load(full).model

    assert {id(p) for p in shared.parameters()}.isdisjoint(id(p) for p in base.parameters())
    weights = by_part(base)["weights"]
    assert resident.held(lora) - resident.held(full) >= weights - 2**20


def test_examples_and_tokenizers_are_kept_until_their_file_changes(rows: Path, tmp_path: Path) -> None:
    resident, file = Resident(), write_rows(tmp_path / "rows.jsonl")
    first = parts(resident, file)
    data = resident.data(first.config, first.tokenizer)
    again = parts(resident, file, "optim.lr=1e-5")
    assert again.tokenizer is first.tokenizer
    assert resident.data(again.config, again.tokenizer) is data

    write_rows(file, 24)
    fresh = resident.data(again.config, again.tokenizer)
    assert len(fresh.train) > len(data.train)
    for limit in range(3, 3 + 2 * KEPT):
        resident.data(config(file, f"data.limit={limit}"), first.tokenizer)
    assert len(resident.examples) == KEPT


def test_a_resumed_run_goes_on_from_a_base_that_stayed(rows: Path, tmp_path: Path) -> None:
    resident, wanted = Resident(), config(rows, *METHODS["adalora"], "checkpoint.every=2")
    whole = run.train(wanted, tmp_path / "whole", made=resident)
    run.train(config(rows, *METHODS["adalora"], "checkpoint.every=2"), tmp_path / "cut", made=resident)
    for folder in ("adapter", "checkpoints/step-00000004"):
        for path in sorted((tmp_path / "cut" / folder).iterdir()):
            path.unlink()
        (tmp_path / "cut" / folder).rmdir()
    (tmp_path / "cut" / "summary.json").unlink()
    resumed = config(rows, *METHODS["adalora"], "checkpoint.every=2", "checkpoint.resume=true")
    done = run.train(resumed, tmp_path / "cut", made=resident)

    state, same = (adapter_state(one.model) for one in (whole, done))
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert done.summary["hashes"] == whole.summary["hashes"]
