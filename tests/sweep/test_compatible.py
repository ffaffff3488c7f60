"""Which jobs may share a base: those whose base would be the same, and no others."""

from __future__ import annotations

import json

import pytest

from lowrank import compose
from lowrank.sweep.compatible import base_key

TINY = ("model=tiny_llama", "loop.precision=fp32")


def key(*overrides: str) -> str:
    return base_key(compose.compose([*TINY, *overrides]).to_dict())


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapter.r=3", "optim.lr=1e-5", "loop.seed=7", "adapter.init=pissa"),
        ("adapter=prefix",),
        ("adapter=full",),
        ("loop.gradient_checkpointing=block", "loop.micro_batch=1", "data.max_length=99"),
        ("adapter.targets={q_proj:{_target_:lowrank.adapters.DoRA,r:2}}",),
    ],
    ids=" ".join,
)
def test_what_is_put_on_a_twin_does_not_part_jobs(overrides: tuple[str, ...]) -> None:
    assert key(*overrides) == key()


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=tiny_gpt2",),
        ("quant=nf4",),
        ("model.dtype=bf16",),
        ("loop.fast=false",),
        ("loop.device=cpu",),
        ("loop.precision=bf16",),
    ],
    ids=" ".join,
)
def test_another_base_parts_them(overrides: tuple[str, ...]) -> None:
    assert key(*overrides) != key()


def test_options_of_a_quantisation_part_them() -> None:
    assert key("quant=nf4") != key("quant=nf4", "quant.double=false")


def test_a_base_that_trains_is_fp32_where_a_frozen_one_is_not() -> None:
    half = "loop.precision=bf16"
    assert key(half, "adapter=full") != key(half, "adapter=lora")
    assert key(half, "adapter.targets={*norm*:{_target_:lowrank.adapters.Full}}") != key(half)
    assert key(half, "adapter=dora") == key(half)
    assert key(half, "adapter=full", "model.dtype=fp32") == key(half, "model.dtype=fp32")
    assert key("loop.precision=fp16") == key()


def test_somebody_elses_class_is_with_its_own_where_the_name_does_not_tell() -> None:
    def of(target: str, precision: str) -> str:
        tree = compose.compose([*TINY]).to_dict()
        tree["adapter"] |= {"_target_": target}
        return base_key({**tree, "loop": {**tree["loop"], "precision": precision}})

    assert of("mine.A", "bf16") != of("lowrank.adapters.LoRA", "bf16")
    assert of("mine.A", "fp32") == of("lowrank.adapters.LoRA", "fp32")


def test_a_key_is_the_same_after_json() -> None:
    tree = compose.compose([*TINY, "quant=nf4"]).to_dict()
    assert base_key(json.loads(json.dumps(tree))) == base_key(tree)
