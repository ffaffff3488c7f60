"""Resuming, the wide way: every method at every precision, stopped in every step and in every evaluation."""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import resuming
from cli import write_rows
from resuming import (
    FP16_OVERFLOWS,
    ROWS,
    SHORT,
    STEPS,
    at_call,
    course,
    differing,
    ended,
    full_disk,
    killed,
    resumed,
    stopped,
)

import lowrank
from lowrank.compose import find_conf
from lowrank.errors import Interrupted

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
METHODS = sorted(path.stem for path in (find_conf() / "adapter").glob("*.yaml"))
OF_THE_BASE = ("full", "bitfit")  # which NF4 weights cannot be
DROPOUT = "adapter.dropout=0.1"
MORE = {
    "adalora": ("adapter.init_r=4", "adapter.target_r=2", "adapter.delta_t=1", DROPOUT),
    "dora": (DROPOUT,),
    "lora": (DROPOUT,),
    "vera": (DROPOUT, "adapter.r=8"),
    "full": ("optim.lr=1e-3",),
}
HALF_LARGE = {"lora": ("adapter.alpha=1e3",), "adalora": ("adapter.alpha=1e3",)}  # so that fp16 overflows
KINDS = {
    "fp32": ("model=tiny_gpt2", "loop.accumulate=4"),
    "bf16 nf4": ("loop.precision=bf16", "quant=nf4", "optim.weight_decay=0.1"),
    "fp16": ("model=tiny_gpt2", "loop.precision=fp16", "loop.accumulate=2", "optim=lora_plus", "optim.groups=[]"),
}
SKIPS = (
    "adapter.targets={embedding:{_target_:resuming_adapters.Poisoned,r:4},*.q_proj:{_target_:resuming_adapters.Hooked},"
    "*.mlp.*:{_target_:lowrank.adapters.AdaLoRA,init_r:4,target_r:2,delta_t:1}}"
)
HOOKED = ("adapter._target_=resuming_adapters.Hooked",)
OTHERS = {
    **{f"init {init}": ("adapter=lora", f"adapter.init={init}", DROPOUT) for init in ("pissa", "olora", "loftq")},
    "pissa nf4": ("adapter.init=pissa", "quant=nf4", "loop.precision=bf16"),
    "rslora, A frozen": ("adapter.rslora=true", "adapter.freeze_a=true"),
    "several methods": (
        "adapter.targets={*.q_proj:{_target_:resuming_adapters.Hooked},*.mlp.*:{_target_:lowrank.adapters.AdaLoRA,"
        "init_r:4,target_r:2,delta_t:1},*.v_proj:{_target_:lowrank.adapters.DoRA,r:4},lm_head:null}",
    ),
    "8 bits, blocks of state": ("optim=adamw8bit", "adapter.r=64", "loop.accumulate=2"),
    "amsgrad": ("+optim.amsgrad=true", "optim.weight_decay=0.1", "schedule=cosine"),
    "adagrad": ("optim=sgd", "optim._target_=torch.optim.Adagrad", "~optim.momentum", "~optim.nesterov"),
    "plus, cosine": ("optim=lora_plus", "schedule=cosine", "loop.accumulate=4"),
    "nesterov": ("optim=sgd", "optim.nesterov=true", "loop.max_grad_norm=.inf"),
    "recomputed gpt2": ("model=tiny_gpt2", "loop.gradient_checkpointing=true", DROPOUT, "loop.accumulate=4"),
    "recomputed in part": ("loop.gradient_checkpointing=selective", DROPOUT, "loop.accumulate=4"),
    "recomputed in part, plain": ("loop.gradient_checkpointing=selective", "loop.fast=false", "adapter=dora", DROPOUT),
    "recomputed, nf4": ("loop.gradient_checkpointing=block", "quant=nf4", "loop.precision=bf16", DROPOUT),
    "prefix recomputed": ("adapter=prefix", "loop.gradient_checkpointing=true", "loop.accumulate=2"),
    "long texts": ("loop.micro_batch=null", "loop.micro_batch_tokens=64", "loop.accumulate=4", DROPOUT),
    "epochs": ("loop.steps=null", "loop.epochs=2.5", "loop.accumulate=2", *HOOKED),
    "slow path": ("loop.fast=false", DROPOUT),
    "average": ("loop.average=0.5", DROPOUT, "eval.every=1"),
    "average fp16": ("loop.average=0.9", *FP16_OVERFLOWS, "loop.accumulate=2"),
    "average of adalora": ("adapter=adalora", *MORE["adalora"], "loop.average=0.7", "eval.every=2"),
    "patience": ("loop.patience=2", "eval.every=1", "optim.lr=1.0"),
    "patience left": ("loop.patience=3", "eval.every=1", "loop.average=0.5"),
}
Whole = Callable[..., tuple[Path, list[str]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    rows = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)

    def run(*case: str, steps: int = STEPS) -> tuple[Path, list[str]]:
        overrides = [*SHORT, f"data.path={rows}", *case]
        return lowrank.train(overrides, tmp_path_factory.mktemp("whole") / "run").folder, overrides

    return run


@pytest.fixture
def poisoned(tmp_path: Path) -> str:
    """Two of the rows make NaN of their batch."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS).read_text().splitlines()
    spoilt = [row.replace("Say", "~Say") if number in (4, 8) else row for number, row in enumerate(rows)]
    (tmp_path / "poisoned.jsonl").write_text("\n".join(spoilt))
    return f"data.path={tmp_path / 'poisoned.jsonl'}"


def moved_by_dying(folder: Path, overrides: list[str], scratch: Path) -> dict[int, list[str]]:
    """What differs in the end, by the last step that was saved when the process died."""
    saved = range(1, len(list((folder / "checkpoints").glob("step-*"))) + 1)
    found = {}
    for at in saved:
        resumed(killed(folder, scratch / f"after {at}", at=at), *overrides)
        found[at] = differing(ended(folder), ended(scratch / f"after {at}"))
    assert len(found) > 2
    return {at: names for at, names in found.items() if names}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method_goes_on_from_every_step(method: str, kind: str, whole: Whole, tmp_path: Path) -> None:
    if kind == "bf16 nf4" and method in OF_THE_BASE:
        pytest.skip("trains the base's own weights")
    larger = HALF_LARGE.get(method, ()) if kind == "fp16" else ()
    folder, overrides = whole(f"adapter={method}", *KINDS[kind], *MORE.get(method, ()), *larger)
    assert moved_by_dying(folder, overrides, tmp_path) == {}


@pytest.mark.parametrize("case", OTHERS)
def test_and_so_does_one_of_every_start_optimizer_and_schedule(case: str, whole: Whole, tmp_path: Path) -> None:
    folder, overrides = whole(*OTHERS[case])
    assert moved_by_dying(folder, overrides, tmp_path) == {}


@pytest.mark.parametrize("background", ["false", "true"])
@pytest.mark.parametrize("how", ["crash", "terminate", "interrupt"])
@pytest.mark.parametrize("at", range(1, STEPS + 1))
def test_it_may_be_stopped_inside_every_step(
    at: int, how: str, background: str, hooked: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, overrides = hooked
    changes = ("checkpoint.every=2", f"checkpoint.background={background}")
    stopped(tmp_path, *overrides, *changes, after=at, by=getattr(resuming, how))
    resumed(tmp_path, *overrides, *changes)
    assert differing(course(folder), course(tmp_path)) == []


@pytest.fixture(scope="module")
def hooked(whole: Whole) -> tuple[Path, list[str]]:
    return whole(*HOOKED, DROPOUT, "loop.accumulate=2", "loop.average=0.8", "loop.patience=3", "eval.every=2")


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("at", range(1, 8))
def test_and_inside_every_evaluation(at: int, every: int, hooked: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Three held-out losses on the way, one at the end, and its generated texts."""
    folder, overrides = hooked
    with pytest.raises(Interrupted), at_call(at, resuming.terminate, training=False):
        lowrank.train([*overrides, f"checkpoint.every={every}"], tmp_path)
    resumed(tmp_path, *overrides, "checkpoint.every=1")
    compared = ended if every == 1 else course
    assert differing(compared(folder), compared(tmp_path)) == []


@pytest.mark.parametrize(("case", "every"), [("overflowing", 1), ("skipping", 3)], ids=["overflowing", "skipping"])
def test_and_inside_every_forward_pass(case: str, every: int, whole: Whole, poisoned: str, tmp_path: Path) -> None:
    """Also of a batch that is skipped, and of a step that overflows and comes again."""
    skipping = (poisoned, SKIPS, "loop.on_nonfinite=skip", "eval.generate.limit=0")
    more = ("loop.accumulate=2", f"checkpoint.every={every}", *(FP16_OVERFLOWS if case == "overflowing" else skipping))
    folder, overrides = whole(*more)
    found = {}
    for at in itertools.count(1):
        try:
            with at_call(at, resuming.terminate, training=True):
                lowrank.train(overrides, tmp_path / str(at))
            break
        except Interrupted:
            resumed(tmp_path / str(at), *overrides)
            found[at] = differing(course(folder), course(tmp_path / str(at)))
    assert len(found) > 2 * STEPS
    assert {at: names for at, names in found.items() if names} == {}


@pytest.mark.parametrize("background", ["false", "true"])
def test_and_by_a_full_disk_at_any_write(background: str, hooked: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Of checkpoints, metrics, digests, the adapter, the summary and the report: at every nineteenth."""
    folder, overrides = hooked
    changes = ("checkpoint.every=2", f"checkpoint.background={background}")
    found = {}
    for writes in itertools.count(1, 19):
        run = tmp_path / str(writes)
        try:
            with full_disk(run, writes):
                lowrank.train([*overrides, *changes], run)
            break
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            resumed(run, *overrides, *changes)
            found[writes] = differing(course(folder), course(run))
        shutil.rmtree(run)
    assert len(found) > 20
    assert {writes: names for writes, names in found.items() if names} == {}


@pytest.mark.parametrize("first", ["none", "tensorboard"])
def test_a_tracker_may_come_and_go(first: str, hooked: tuple[Path, list[str]], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder, overrides = hooked
    then = {"none": "tensorboard", "tensorboard": "none"}[first]
    stopped(tmp_path, *overrides, f"track={first}", after=4, by=resuming.crash)
    resumed(tmp_path, *overrides, f"track={then}")
    assert differing(ended(folder), ended(tmp_path)) == []
