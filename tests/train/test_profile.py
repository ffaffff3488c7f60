"""``loop.profile``: it watches and changes nothing, and its shares are of the steps, whole."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SMALL
from loops import loop_of, same, values
from torch import nn

from lowrank import compose, fast, run
from lowrank.fast.loss import chunked
from lowrank.quant.convert import quantize
from lowrank.session.watching import norms
from lowrank.train.loop import Loop
from lowrank.train.loss import target_loss
from lowrank.train.profile import SHARES, TRACE, Profile
from lowrank.train.shares import KINDS, OTHER, shares


def watched(model: Any, folder: Path, steps: int, last: int = 6, fused: bool = False) -> Loop:
    loss = chunked(target_loss) if fused else target_loss
    loop = loop_of(model, dropout=0.1, loss=loss)
    if fused:
        trained = {id(p) for p in loop.parameters.values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        fast.fuse(model)
    loop.hooks = [Profile(loop, folder, steps, last=last, say=lambda text: None, named=norms(model))]
    return loop


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / SHARES).read_text())
    return found


def test_a_profiled_run_is_the_same_run_bit_for_bit(make_llama: Any, tmp_path: Path) -> None:
    plain, profiled = loop_of(make_llama(), dropout=0.1), watched(make_llama(), tmp_path, 2)
    for loop in (plain, profiled):
        loop.run(5)
    assert (tmp_path / SHARES).is_file()
    assert same(values(plain), values(profiled))
    assert plain.state.recent == profiled.state.recent


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_kinds_add_up_to_the_step_and_work_is_found_in_each(fused: bool, llama: Any, tmp_path: Path) -> None:
    quantize(llama)
    watched(llama, tmp_path, 2, fused=fused).run(4)
    found = told(tmp_path)
    assert (found["first"], found["steps"]) == (2, 2)
    assert list(found["ms"]) == list(KINDS)
    assert sum(found["ms"].values()) == pytest.approx(found["step_ms"], rel=1e-3)
    assert all(time > 0 for time in found["ms"].values())


def test_the_trace_holds_the_profiled_steps_and_no_other(llama: Any, tmp_path: Path) -> None:
    watched(llama, tmp_path, 3).run(6)
    events = json.loads(gzip.decompress((tmp_path / TRACE).read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "lowrank: step" for event in events) == 3


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_run_that_ends_before_leaves_what_there_is(last: int, llama: Any, tmp_path: Path) -> None:
    loop = watched(llama, tmp_path, 50, last=last)
    loop.run(last)
    assert (told(tmp_path)["steps"] if last > 1 else 0) == last - 1
    assert (tmp_path / SHARES).exists() == (last > 1)


def test_nothing_of_it_stays_behind(llama: Any, tmp_path: Path) -> None:
    loop = watched(llama, tmp_path, 1)
    watching, classes = (loop, loop.batches, llama), {owner: dict(vars(owner)) for owner, _, _ in norms(llama)}
    before = [dict(vars(owner)) for owner in watching]
    loop.run(4)
    changed = [set(vars(owner)) ^ set(was) for owner, was in zip(watching, before, strict=True)]
    assert changed == [set(), set(), set()]
    assert all(dict(vars(owner)) == was for owner, was in classes.items())


def test_a_product_is_matmul_wherever_it_runs_and_a_norms_gradient_is_norm() -> None:
    norm, layer = nn.LayerNorm(64), nn.Linear(64, 64)
    x = torch.randn(256, 64, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function("lowrank: step"), torch.profiler.record_function("lowrank: forward"):
            y = layer(norm(x))
        with torch.profiler.record_function("lowrank: step"):
            y.backward(torch.ones_like(y))
    found = shares(profiler.events(), 1, "cpu")
    names = {name for name, _, _ in found.operators}
    assert {"aten::addmm", "aten::mm", "aten::native_layer_norm_backward"} <= names
    for kind in ("matmul", "norm", OTHER):
        assert found.ms[kind] > 0, kind
    assert found.ms["attention"] == found.ms["data"] == found.ms["loss"] == 0


def test_a_run_leaves_them_in_its_directory_and_on_its_page(rows: Path, cache: None, tmp_path: Path) -> None:
    given = ["model=tiny_llama", *SMALL, f"data.path={rows}", "loop.steps=4", "loop.profile=2", "eval.before=false"]
    run.train(compose.compose(given), tmp_path, "", None)
    assert told(tmp_path / "profile")["steps"] == 2
    assert "Where a step" in (tmp_path / "report.html").read_text()
    assert "profile of steps 2 to 3" in (tmp_path / "events.log").read_text()
