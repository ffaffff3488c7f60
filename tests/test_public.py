"""The Python that outside scripts rely on, and the promises of a run: same seed, same bits, whatever watches it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import ROOT, SMALL, environment, run
from torch import Tensor
from transformers import LlamaForCausalLM

import lowrank
from lowrank.adapters import LoRA, store
from lowrank.quant.nf4 import NF4Linear

RULES = {"*.q_proj": partial(LoRA, r=8, alpha=16), "*.v_proj": partial(LoRA, r=4)}
# GPT-2 has a dropout of its own: both kinds are on.
DROPOUT = ("model=tiny_gpt2", "adapter.dropout=0.1", "loop.steps=12", "eval.before=false")
LONG = ("model=tiny_llama", "adapter.dropout=0.1", "loop.steps=300", "eval.before=false", "checkpoint.every=50")


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Callable[..., Any]:
    """Trains a small run in a folder of its own."""

    def train(*overrides: str) -> Any:
        return lowrank.train([*SMALL, f"data.path={rows}", *overrides], tmp_path_factory.mktemp("run") / "run")

    return train


@pytest.fixture(scope="module")
def plain(trained: Callable[..., Any]) -> Any:
    """With dropout, and nothing that watches."""
    return trained(*DROPOUT)


def adapter(run: Any) -> dict[str, Tensor]:
    return store.read(run.folder / "adapter")[1]


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


# Models and adapters


def test_importing_lowrank_imports_no_torch() -> None:
    done = run("-c", "import sys, lowrank; lowrank.train; print([m for m in ('torch', 'hydra') if m in sys.modules])")
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_every_public_name_is_there_and_no_other_is() -> None:
    for name in lowrank.__all__:
        assert callable(getattr(lowrank, name)), name
    assert all(f"{name}" in lowrank.__doc__ for name in lowrank.__all__ if name not in ("InjectionPlan", "Run"))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        lowrank.trian  # noqa: B018


def test_a_plan_changes_nothing_and_prints_every_site(llama: LlamaForCausalLM) -> None:
    before = dict(llama.named_modules())
    plan = lowrank.plan(llama, RULES)
    assert dict(llama.named_modules()) == before
    printed = str(plan).splitlines()
    assert [line.split()[0] for line in printed[1:-1]] == [
        f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")
    ]
    # q: 8 (32 + 32), v: 4 (32 + 16), in two layers
    assert plan.trainable_parameters == 2 * (8 * 64 + 4 * 48)
    assert f"{plan.trainable_parameters:,} trainable parameters" in printed[-1]
    assert lowrank.InjectionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_apply_works_in_place_and_remove_puts_the_same_objects_back(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    before, untouched = dict(llama.named_modules()), logits(llama, tokens)
    assert lowrank.apply(llama, lowrank.plan(llama, RULES), seed=0) is llama
    site = llama.model.layers[0].self_attn.q_proj
    assert (tuple(site.adapter.A.shape), tuple(site.adapter.B.shape)) == ((8, 32), (32, 8))
    assert torch.equal(logits(llama, tokens), untouched)
    assert lowrank.remove(llama) is llama
    after = dict(llama.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


@pytest.fixture
def wrapped(llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """With an adapter that does something."""
    lowrank.apply(llama, lowrank.plan(llama, RULES), seed=0)
    for layer in llama.model.layers:
        for site in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            torch.nn.init.constant_(site.adapter.B, 0.1)
    return llama


def test_merging_gives_a_new_plain_model_and_says_what_it_cost(wrapped: LlamaForCausalLM, tokens: Tensor) -> None:
    expected = logits(wrapped, tokens)
    merged, report = lowrank.merge(wrapped)
    assert merged is not wrapped
    assert not any("adapter" in name for name, _ in merged.named_modules())
    assert (logits(merged, tokens) - expected).abs().max() <= 1e-5
    assert torch.equal(logits(wrapped, tokens), expected)
    assert str(report).startswith("merged 4 sites")


@pytest.mark.parametrize("form", ["adapter", "peft"])
def test_a_saved_adapter_comes_back_on_a_bare_model(
    form: str, wrapped: LlamaForCausalLM, make_llama: Callable[..., Any], tokens: Tensor, tmp_path: Path
) -> None:
    save, load = {
        "adapter": (lowrank.save_adapter, lowrank.load_adapter),
        "peft": (lowrank.export_peft, lowrank.import_peft),
    }[form]
    save(wrapped, tmp_path / "saved")
    bare = make_llama()
    assert load(bare, tmp_path / "saved", name=None) is bare
    assert (logits(bare, tokens) - logits(wrapped, tokens)).abs().max() <= 1e-5


def test_adapters_with_names_are_switched_mixed_and_disabled(
    wrapped: LlamaForCausalLM, make_llama: Callable[..., Any], tokens: Tensor, tmp_path: Path
) -> None:
    lowrank.save_adapter(wrapped, tmp_path / "saved")
    model, bare, tuned = make_llama(), make_llama(), logits(wrapped, tokens)
    for name in ("a", "b"):
        assert lowrank.load_adapter(model, tmp_path / "saved", name=name) is model
    assert not torch.equal(tuned, logits(bare, tokens))
    with lowrank.use(model, ["a", None]):
        mixed = logits(model, tokens)
    assert (mixed[0] - tuned[0]).abs().max() <= 1e-6 * tuned.abs().max()
    assert (mixed[1] - logits(bare, tokens)[1]).abs().max() <= 1e-6 * tuned.abs().max()
    with lowrank.disable(model):
        assert torch.equal(logits(model, tokens), logits(bare, tokens))
    lowrank.freeze(model, "b")
    lowrank.use(model, "b")
    lowrank.resize(model, 12, name="b")
    assert (logits(model, tokens) - tuned).abs().max() <= 1e-5
    lowrank.unfreeze(model, "b")
    assert lowrank.remove(model) is model
    assert torch.equal(logits(model, tokens), logits(bare, tokens))


def test_quantize_works_in_place_and_leaves_the_head(llama: LlamaForCausalLM) -> None:
    assert lowrank.quantize(llama, "nf4", double=True, skip=["lm_head"]) is llama
    assert isinstance(llama.model.layers[0].self_attn.q_proj, NF4Linear)
    assert type(llama.lm_head) is torch.nn.Linear
    lowrank.apply(llama, lowrank.plan(llama, {"all-linear": LoRA}), seed=0)


# Runs


def test_train_is_what_train_py_does_and_open_reads_it(plain: Any) -> None:
    import lowrank.train.loop

    assert callable(lowrank.train)
    opened = lowrank.open(str(plain.folder))
    assert opened.config == plain.config
    assert opened.plan == plain.plan
    assert opened.tokenizer.decode([72, 105]) == "Hi"
    assert [row["step"] for row in opened.metrics if row["event"] == "step"] == list(range(1, 13))
    assert opened.summary["status"] == "done"
    ids = torch.tensor([[72, 101, 108, 108, 111]])
    assert torch.equal(logits(opened.model, ids), logits(plain.model, ids))
    assert not opened.model.training


@pytest.mark.parametrize(
    "watching",
    [
        ("eval.every=1",),
        ("checkpoint.every=1",),
        ("track=tensorboard", "eval.every=5", "checkpoint.every=2", "eval.before=true"),
        ("eval.generate.do_sample=true", "eval.generate.limit=1", "eval.limit=1"),
        (),
    ],
    ids=["evaluating", "saving", "tracking", "sampling", "again"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_nothing_that_watches_a_run_moves_it(plain: Any, trained: Callable[..., Any], watching: tuple[str]) -> None:
    assert same_bits(adapter(trained(*DROPOUT, *watching)), adapter(plain))


def test_another_seed_is_another_run(plain: Any, trained: Callable[..., Any]) -> None:
    assert not same_bits(adapter(trained(*DROPOUT, "loop.seed=1")), adapter(plain))


def test_accumulating_four_micro_batches_of_one_is_one_of_four(trained: Callable[..., Any]) -> None:
    same = ("model=tiny_llama", "loop.steps=6", "optim=sgd", "eval.before=false", "eval.generate.limit=0")
    one = adapter(trained(*same, "loop.micro_batch=4"))
    four = adapter(trained(*same, "loop.micro_batch=1", "loop.accumulate=4"))
    assert max(float((one[name] - four[name]).abs().max()) for name in one) <= 1e-6
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if name.endswith(".B")) > 1e-3


def test_a_run_that_is_stopped_and_resumed_ends_in_the_same_bits(
    trained: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    whole, folder = trained(*LONG), tmp_path / "run"
    overrides = [*SMALL, f"data.path={rows}", *LONG]
    code, said = stop_after(25, folder, overrides)
    assert code == 130, said
    assert said.splitlines()[-1].endswith("checkpoint.resume=true continues it.")
    assert lowrank.open(folder).summary["status"] == "interrupted"
    stopped = len(lowrank.open(folder).metrics)
    assert 25 <= stopped < 300
    resumed = lowrank.train([*overrides, "checkpoint.resume=true"], folder)
    assert same_bits(adapter(resumed), adapter(whole))
    for name in ("step", "loss", "lr", "grad_norm", "real_tokens", "target_tokens"):
        assert [row.get(name) for row in resumed.metrics] == [row.get(name) for row in whole.metrics], name
    assert resumed.summary["real_tokens"] == whole.summary["real_tokens"]
    assert f"resuming after step {stopped} " in (folder / "events.log").read_text()


def stop_after(rows: int, folder: Path, overrides: list[str]) -> tuple[int, str]:
    """SIGTERM once ``rows`` lines of metrics are there; exit code and standard error."""
    command = [sys.executable, str(ROOT / "train.py"), *overrides, f"hydra.run.dir={folder}"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= rows):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    return process.returncode, said
