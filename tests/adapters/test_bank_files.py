"""Several adapters on one model: saved one by one, merged, taken off; and what cannot stand beside others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from banks import RULES, alone, folder, furthest, logits, together, tokens_of, trained
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

import lowrank
from lowrank.adapters import Full, LoRA, NotMergeable, Prompt
from lowrank.adapters.inject import apply, current_plan, remove
from lowrank.adapters.plan import Rules, plan
from lowrank.adapters.sites import adapted
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.errors import ConfigError, RefusedError
from lowrank.eval.generate import room
from lowrank.quant.convert import quantize

Make = Callable[..., Any]


@pytest.fixture(params=["make_llama", "make_gpt2"])
def make(request: pytest.FixtureRequest) -> Make:
    """Either architecture."""
    return request.getfixturevalue(request.param)


def requires_grad(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


# Files, merging, removing


def test_one_of_several_is_saved_as_if_it_stood_alone(make: Make, tmp_path: Path) -> None:
    model = together(make, tmp_path)
    for name in RULES:
        again = save_adapter(model, tmp_path / "again" / name, name=name)
        first, second = load_file(tmp_path / name / "adapter.safetensors"), load_file(again / "adapter.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)
        assert current_plan(load_adapter(make(), again)) == current_plan(model, name)
    with pytest.raises(ConfigError, match=r"carries several adapters \(a, b, c, d\): say which"):
        save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_merging_merges_the_one_in_use(make: Make, tmp_path: Path) -> None:
    model, ids = together(make, tmp_path, "ab"), tokens_of(2, 9)
    for name in ("a", "b"):
        with lowrank.use(model, name):
            merged, _ = lowrank.merge(model)
            assert furthest(logits(merged, ids), logits(model, ids)) <= 1e-5
        assert not list(adapted(merged))
    with lowrank.use(model, ["a", "b"]), pytest.raises(NotMergeable, match="rows of a batch"):
        lowrank.merge(model)


def test_remove_takes_everything_off_and_puts_the_same_objects_back(make: Make, tmp_path: Path) -> None:
    model, ids = make(), tokens_of(2, 9)
    modules, before = dict(model.named_modules()), logits(model, ids)
    for name in "ab":
        load_adapter(model, folder(make, name, tmp_path), name=name)
    lowrank.use(model, ["a", "b"])
    assert remove(model) is model
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)
    assert torch.equal(logits(model, ids), before)
    assert not model._forward_pre_hooks
    load_adapter(model, folder(make, "b", tmp_path), name="a")


def test_positions_are_those_that_the_adapter_in_use_takes(make: Make) -> None:
    model = make()
    apply(model, plan(model, {"backbone": partial(Prompt, length=100)}))
    assert room(model) == 28
    with lowrank.disable(model):
        assert room(model) == 128
    apply(model, plan(model, {"all-linear": LoRA}), name="b")
    with lowrank.use(model, "b"):
        assert room(model) == 128
    with lowrank.use(model, ["default", "default"]):
        assert room(model) == 28
    lowrank.use(model, None)
    assert room(model) == 128


def test_a_copy_has_a_switch_of_its_own(make: Make, tmp_path: Path) -> None:
    model, ids = together(make, tmp_path, "ab"), tokens_of(2, 9)
    with lowrank.use(model, ["a", "b"]):
        other = copy.deepcopy(model)
    lowrank.use(other, "b")
    assert torch.equal(logits(model, ids), logits(alone(make, "a"), ids))
    assert torch.equal(logits(other, ids), logits(alone(make, "b"), ids))


def test_pissa_is_loaded_beside_others_as_twice_the_rank_on_the_original_base(
    make: Make, tmp_path: Path, tokens: Tensor
) -> None:
    rules: Rules = {"all-linear": partial(LoRA, r=3, alpha=5.0, rslora=True, init="pissa")}
    started = trained(make(), rules)
    model = together(make, tmp_path, "a")
    load_adapter(model, save_adapter(started, tmp_path / "pissa"), name="pissa")
    assert {row.options["r"] for row in current_plan(model, "pissa").rows} == {6}
    with lowrank.use(model, "pissa"):
        assert furthest(logits(model, tokens), logits(started, tokens)) <= 1e-5
    with lowrank.use(model, "a"):
        assert torch.equal(logits(model, tokens), logits(alone(make, "a"), tokens))


# Bad input


def test_what_cannot_stand_beside_others_is_refused_with_nothing_changed(
    make_llama: Make, gpt2: GPT2LMHeadModel, tmp_path: Path
) -> None:
    model = together(make_llama, tmp_path, "ab")
    modules, grads = dict(model.named_modules()), requires_grad(model)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantized = quantize(make_llama(), "nf4")
    others: dict[str, tuple[Any, type[Exception], str]] = {
        "a": (folder(make_llama, "b", tmp_path), ConfigError, "an adapter 'a' is on the model already"),
        "x.y": (folder(make_llama, "b", tmp_path), ConfigError, "'x.y' is not allowed"),
        "clock": (folder(make_llama, "b", tmp_path), ConfigError, "'clock' is not allowed"),
        "gpt2": (folder(lambda: gpt2, "b", tmp_path / "gpt2"), ConfigError, "is not a site of this model"),
        "wide": (
            folder(lambda: make_llama(hidden_size=64), "b", tmp_path / "wide"),
            ConfigError,
            r"\(64, 64\) is not a site",
        ),
        "full": (
            save_adapter(trained(make_llama(), {"*norm*": Full}), tmp_path / "full"),
            ConfigError,
            "Full changes the base itself",
        ),
        "nf4": (
            save_adapter(trained(quantized, {"q_proj": partial(LoRA, init="pissa")}), tmp_path / "nf4"),
            RefusedError,
            "stands on a base of its own",
        ),
    }
    for name, (where, error, message) in others.items():
        with pytest.raises(error, match=message):
            load_adapter(model, where, name=name)
    with pytest.raises(ConfigError, match="LoRA changes the base itself"):
        apply(model, plan(model, {"q_proj": partial(LoRA, init="pissa")}), name="start")
    with pytest.raises(ConfigError, match="already carries adapters"):
        load_adapter(model, folder(make_llama, "b", tmp_path))
    assert dict(model.named_modules()) == modules
    assert requires_grad(model) == grads
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())


def test_nothing_can_stand_beside_an_adapter_that_changed_its_base(make_llama: Make, tmp_path: Path) -> None:
    for rules in ({"q_proj": partial(LoRA, init="pissa")}, {"*norm*": Full}):
        model = trained(make_llama(), rules)
        modules = dict(model.named_modules())
        with pytest.raises(ConfigError, match=r"changed its base at the start|trains its own parameters"):
            load_adapter(model, folder(make_llama, "a", tmp_path), name="a")
        assert dict(model.named_modules()) == modules


def test_unknown_names_are_refused_with_the_nearest(make_llama: Make, tmp_path: Path) -> None:
    model, ids = make_llama(), tokens_of(2, 9)
    with pytest.raises(ConfigError, match="carries no named adapter"):
        lowrank.use(model, "a")
    for name in ("french", "german"):
        load_adapter(model, folder(make_llama, "a", tmp_path), name=name)
    before = logits(model, ids)
    for call in (lowrank.use, lowrank.freeze, lowrank.unfreeze, current_plan):
        with pytest.raises(ConfigError, match="Did you mean 'german'"):
            call(model, "germn")
    with pytest.raises(ConfigError, match=r"no adapter 'germn'.*There are: french, german"):
        lowrank.use(model, ["french", "germn"])
    with pytest.raises(ConfigError, match="use: 5 is not allowed; a name, a list of names"):
        lowrank.use(model, 5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="name: '5' is not allowed"):
        load_adapter(model, tmp_path / "a", name=5)  # type: ignore[arg-type]
    assert torch.equal(logits(model, ids), before)
