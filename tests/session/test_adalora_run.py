"""AdaLoRA through ``lowrank.train``: it prunes without being asked to, tells of it, and resumes in the same bits."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SMALL
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import lowrank
from lowrank.adapters import store
from lowrank.errors import ConfigError
from lowrank.keys import key
from lowrank.models.tiny import tiny_llama
from lowrank.train import checkpoint

STEPS, INIT, TARGET, SITES = 20, 4, 2, 14  # t_i = 2, T − t_f = 14
RUN = (
    *("model=tiny_llama", f"loop.steps={STEPS}", "adapter=adalora", f"adapter.init_r={INIT}"),
    *(f"adapter.target_r={TARGET}", "adapter.delta_t=3", "checkpoint.every=0"),
    *("eval.before=false", "eval.generate.limit=0", "eval.limit=2"),
)
DROPOUT = (*RUN, "adapter.dropout=0.1", "eval.every=4", "checkpoint.keep=99")


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Callable[..., Any]:
    def train(*overrides: str, folder: Path | None = None) -> Any:
        folder = folder or tmp_path_factory.mktemp("run") / "run"
        return lowrank.train([*SMALL, f"data.path={rows}", *overrides], folder)

    return train


@pytest.fixture(scope="module")
def whole(trained: Callable[..., Any]) -> Any:
    """With dropout, a checkpoint at every step, and never stopped."""
    return trained(*DROPOUT, "checkpoint.every=1")


def adapter(run: Any) -> dict[str, Tensor]:
    return store.read(run.folder / "adapter")[1]


def ranks(run: Any) -> dict[int, dict[str, int]]:
    return {row["step"]: row["ranks"] for row in run.metrics if row["event"] == "ranks"}


def alive(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Entries of E that are not zero, by site."""
    return {n.removesuffix(".adapter.E"): int((t != 0).sum()) for n, t in tensors.items() if n.endswith(".E")}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_prunes_by_itself_to_exactly_the_target(whole: Any) -> None:
    told = ranks(whole)
    assert list(told) == [1, 5, 8, 11, 14, 20]
    totals = [sum(found.values()) for found in told.values()]
    assert totals == [56, 39, 31, 28, 28, 28]  # 28 + 28 (1 − (t − 2)/12)³, rounded down
    assert alive(adapter(whole)) == told[20] == told[14]
    assert len(set(told[20].values())) > 1  # not the same everywhere


def test_the_ranks_are_in_the_metrics_in_the_order_of_time_and_in_the_report(whole: Any) -> None:
    steps = [row["step"] for row in whole.metrics]
    assert steps == sorted(steps)
    page = (whole.folder / "report.html").read_text(encoding="utf-8")
    assert "Rank of each site over time" in page
    assert "Final rank of each site" in page
    assert "model.layers.1.mlp.down_proj\nrank 4" in page


@pytest.mark.parametrize("at", [1, 6, 8, 13, 14, 17])
def test_a_run_cut_off_anywhere_and_resumed_ends_in_the_same_bits(
    at: int, whole: Any, trained: Callable[..., Any], tmp_path: Path
) -> None:
    """Cut off after later rows were written than its last checkpoint knows of."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    for path in checkpoint.committed(folder / "checkpoints"):
        if path.name > f"step-{at:08d}":
            shutil.rmtree(path)
    for made_at_the_end in ("summary.json", "samples.jsonl", "report.html"):
        (folder / made_at_the_end).unlink()
    shutil.rmtree(folder / "adapter")
    resumed = trained(*DROPOUT, "checkpoint.every=20", "checkpoint.resume=true", folder=folder)
    assert f"resuming after step {at} " in (folder / "events.log").read_text()
    assert same_bits(adapter(resumed), adapter(whole))
    last = f"checkpoints/step-{STEPS:08d}"
    for file in ("adapter", "optimizer", "hooks"):
        name = f"{last}/{file}.safetensors"
        assert same_bits(load_file(folder / name), load_file(whole.folder / name)), file
    for name in ("event", "step", "loss", "lr", "grad_norm", "ranks"):
        assert [row.get(name) for row in resumed.metrics] == [row.get(name) for row in whole.metrics], name


def test_a_checkpoint_holds_all_that_the_allocator_knows(whole: Any) -> None:
    held = load_file(whole.folder / "checkpoints/step-00000006/hooks.safetensors")
    entries = [name.replace(".adapter", "") for name in adapter(whole)]
    names = {f"{what}.{entry}" for entry in entries for what in ("importance", "uncertainty")}
    assert held.keys() == {f"0.{name}" for name in (*names, "pruned")}
    assert int(held["0.pruned"].sum()) == 56 - 39
    assert all(bool(tensor.any()) for tensor in held.values())


def test_recomputing_and_watching_less_do_not_move_it(whole: Any, trained: Callable[..., Any]) -> None:
    other = trained(*RUN, "adapter.dropout=0.1", "loop.gradient_checkpointing=true")
    assert same_bits(adapter(other), adapter(whole))


def test_accumulating_four_micro_batches_prunes_as_one_of_four(trained: Callable[..., Any]) -> None:
    one, four = (
        trained(*RUN, "loop.steps=8", f"loop.micro_batch={size}", f"loop.accumulate={4 // size}") for size in (4, 1)
    )
    assert ranks(one) == ranks(four)
    assert sum(alive(adapter(one)).values()) == TARGET * SITES


def test_in_fp16_a_step_that_overflows_comes_again_and_is_counted_once(trained: Callable[..., Any]) -> None:
    huge = ("adapter.alpha=1e5", "optim.lr=1e-7")  # gradients of fp16's range at the first loss scales
    run = trained(*RUN, *huge, "loop.precision=fp16", "checkpoint.every=20")
    last = checkpoint.read(run.folder / f"checkpoints/step-{STEPS:08d}")
    assert last.state["scaler"]["scale"] < 2**16
    assert [row["step"] for row in run.metrics if row["event"] == "step"] == list(range(1, STEPS + 1))
    assert [sum(found.values()) for found in ranks(run).values()] == [56, 39, 31, 28, 28, 28]
    assert sum(alive(adapter(run)).values()) == TARGET * SITES
    assert all(bool(value.isfinite().all()) for value in last.tensors["hooks"].values())


@pytest.mark.parametrize("more", [("quant=nf4",), ("model=tiny_gpt2",), ("model=tiny_gpt2", "quant=nf4")], ids=" ".join)
def test_it_prunes_on_every_kind_of_base(more: tuple[str, ...], trained: Callable[..., Any]) -> None:
    found = alive(adapter(trained(*RUN, *more, "loop.steps=4")))
    assert sum(found.values()) == TARGET * len(found)


def test_rules_with_options_of_their_own_have_budgets_of_their_own(trained: Callable[..., Any]) -> None:
    own = "*.q_proj:{init_r:6,target_r:3}"
    targets = f"adapter.targets={{{own},*.mlp.*:null,*.v_proj:{{_target_:lowrank.adapters.LoRA}}}}"
    run = trained(*RUN, targets, "loop.steps=4")
    found = alive(adapter(run))
    assert sum(rank for path, rank in found.items() if path.endswith("q_proj")) == 3 * 2
    assert sum(rank for path, rank in found.items() if ".mlp." in path) == TARGET * 6
    last = [row["ranks"] for row in run.metrics if row["event"] == "ranks" and row["step"] == 4]
    assert last[0] | last[1] == found


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["adapter.delta_t=13"], "of this run's 20 steps the ranks change in 3 to 14: at most 12, or null."),
        (
            ["loop.steps=null", "loop.epochs=1", "adapter.delta_t=13"],
            "of this run's 9 steps the ranks change in 1 to 7",
        ),
    ],
    ids=["steps", "epochs"],
)
def test_a_schedule_that_does_not_fit_is_refused_before_the_model_is_read_and_leaves_no_folder(
    more: list[str], said: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        lowrank.train([*SMALL, f"data.path={rows}", *RUN, *more], tmp_path / "run")
    assert str(refused.value).startswith(f"adapter.delta_t: 13 is not allowed; {said}")
    assert "fast path" not in capsys.readouterr().err  # said when the weights are there
    assert not (tmp_path / "run").exists()


def peft_trained(steps: int, calls: bool) -> Any:
    """PEFT's AdaLoRA on the same model, in a loop as a user writes it, with or without ``update_and_allocate``."""
    options = AdaLoraConfig(
        init_r=INIT, target_r=TARGET, tinit=2, tfinal=6, deltaT=3, total_step=STEPS, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny_llama(), options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    for step in range(1, steps + 1):
        rows = torch.randint(0, 256, (2, 16), generator=key(0, "rows", step))
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        if calls:
            model.base_model.update_and_allocate(step)
    return model


def peft_alive(model: Any) -> int:
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
def test_peft_never_prunes_unless_the_user_s_loop_calls_it_and_forgets_its_state(tmp_path: Path, whole: Any) -> None:
    assert peft_alive(peft_trained(STEPS, calls=False)) == INIT * SITES  # and nothing was said: warnings are errors
    assert sum(alive(adapter(whole)).values()) == TARGET * SITES

    called = peft_trained(12, calls=True)
    assert peft_alive(called) < INIT * SITES
    assert called.base_model.rankallocator.exp_avg_ipt
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about a site that it pruned to rank 0
        called.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert again.base_model.rankallocator.exp_avg_ipt == {}
