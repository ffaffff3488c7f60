"""The share of an adapter's effect that a merge keeps, and merges that are refused for it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from merging import logits, trained
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowrank.adapters import LoRA
from lowrank.adapters.inject import adapter_state, apply, named_trainable, remove
from lowrank.adapters.merge import merge
from lowrank.adapters.plan import plan
from lowrank.errors import ConfigError, RefusedError
from lowrank.keys import key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_share_is_what_its_definition_says(llama: LlamaForCausalLM, tokens: Tensor, dtype: torch.dtype) -> None:
    wrapped = trained(llama.to(dtype))
    merged, report = merge(wrapped, probe=tokens)
    ours, theirs = logits(wrapped, tokens).double(), logits(merged, tokens).double()
    bare = logits(remove(copy.deepcopy(wrapped)), tokens).double()
    assert report.share == pytest.approx(float(1 - (theirs - ours).norm() / (ours - bare).norm()), abs=1e-6)
    assert report.effect == pytest.approx(float((ours - bare).norm() / ours.norm()), rel=1e-4)
    assert f"survives there: {report.share:.3f}" in str(report)


def test_an_fp32_merge_keeps_all_of_the_effect(model: nn.Module) -> None:
    _, report = merge(trained(model))
    assert report.share is not None
    assert report.share > 0.9999


def test_a_change_that_drowns_in_bf16_is_refused_by_its_share(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    wrapped = trained(llama.bfloat16(), {"all-linear": LoRA})
    for name, parameter in named_trainable(wrapped).items():
        parameter.data.mul_(3e-2 if name.endswith("B") else 0.2)
    before, state = logits(wrapped, tokens), {n: t.detach().clone() for n, t in adapter_state(wrapped).items()}
    with pytest.raises(RefusedError, match=r"a share of (-?\d\.\d+) of the adapter's effect .*min_share 0.5") as raised:
        merge(wrapped, probe=tokens)
    assert torch.equal(logits(wrapped, tokens), before)
    assert all(torch.equal(t, state[n]) for n, t in adapter_state(wrapped).items())
    for anyway in (0, None):
        _, report = merge(wrapped, probe=tokens, min_share=anyway)
        assert report.share is not None
        assert report.share < 0.5
        assert f"{report.share:.3f}" in str(raised.value)


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("to", ["dense", "nf4"])
def test_an_adapter_without_effect_has_nothing_to_lose(llama: LlamaForCausalLM, init: str, to: str) -> None:
    wrapped = apply(llama, plan(llama, {"all-linear": partial(LoRA, init=init)}))
    _, report = merge(wrapped, to=to)
    assert report.share == 1


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
def test_the_effect_is_measured_from_before_a_start_that_changed_the_base(
    make_llama: Callable[[], LlamaForCausalLM], tokens: Tensor, keep: bool
) -> None:
    bare = logits(make_llama(), tokens)
    model: Any = make_llama()
    apply(model, plan(model, {"all-linear": partial(LoRA, init="pissa"), "embedding": LoRA}), keep_base=keep)
    for name, parameter in named_trainable(model).items():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=key(1, name)))
    _, report = merge(model, probe=tokens)
    wrapped = logits(model, tokens)
    assert report.effect == pytest.approx(float((wrapped - bare).norm() / wrapped.norm()), rel=1e-4)
    assert report.share is not None
    assert report.share > 0.999


def test_a_probe_may_be_rows_of_any_length(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    wrapped = trained(llama)
    row = tokens[0].tolist()
    shares = [merge(wrapped, probe=probe)[1].effect for probe in (tokens[:1], tokens[0], [row])]
    assert shares[0] == shares[1] == shares[2]
    assert merge(wrapped, probe=[row, row[:3]])[1].effect != shares[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "int4"}, "to='int4' is not allowed; dense or nf4"),
        ({"method": "bets"}, "method='bets' is not allowed; naive or best. Did you mean 'best'"),
        ({"min_share": 2}, "min_share=2 is not allowed"),
        ({"min_share": math.nan}, "min_share=nan is not allowed"),
        ({"probe": torch.zeros(2, 3)}, "a probe of 2×3 torch.float32 is not allowed"),
        ({"probe": []}, "a probe of .* is not allowed"),
    ],
)
def test_arguments_out_of_range_are_refused(llama: LlamaForCausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge(trained(llama), **options)
