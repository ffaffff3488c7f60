"""Merging into NF4: the codes that carry the adapter, what stays dense, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from merging import Q, logits, trained
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lowrank.adapters import Adapted, Full, LoRA, dense_weight
from lowrank.adapters.inject import adapter_state, apply, named_trainable, remove
from lowrank.adapters.merge import MergeReport, merge
from lowrank.adapters.plan import Rules, plan
from lowrank.adapters.sites import adapted, sites
from lowrank.errors import ConfigError, RefusedError
from lowrank.keys import key
from lowrank.quant.convert import quantize
from lowrank.quant.nf4 import NF4Linear
from lowrank.quant.rounding import rounded

LINEAR: Rules = {"all-linear": partial(LoRA, r=2)}
PROBE = torch.randint(0, 64, (4, 32), generator=key(0, "probe"))
CALIBRATION = torch.randint(0, 64, (32, 32), generator=key(0, "calibration"))
into_nf4 = partial(merge, to="nf4", min_share=None, probe=PROBE, calibration=CALIBRATION)


def slightly(model: Any, rules: Rules = LINEAR, size: float = 0.01) -> Any:
    """``model`` with adapters that change a weight by a tenth: a change that rounding by itself mostly loses."""
    trained(model, rules)
    for name, parameter in named_trainable(model).items():
        parameter.data.normal_(0, size if name.endswith("B") else 0.2, generator=key(1, name))
    return model


def layers(model: nn.Module) -> dict[str, NF4Linear]:
    return {path: module for path, module in sites(model) if isinstance(module, NF4Linear)}


def share(report: MergeReport) -> float:
    assert report.share is not None
    return report.share


@pytest.mark.parametrize("quantised", [True, False], ids=["nf4", "dense"])
def test_the_codes_chosen_on_other_tokens_keep_more_of_the_effect_than_rounding(
    model: nn.Module, quantised: bool
) -> None:
    wrapped = slightly(quantize(model) if quantised else model)
    _, naive = into_nf4(wrapped, method="naive")
    _, best = into_nf4(wrapped)
    assert share(best) > share(naive) + 0.15


def alone(wrapped: Any) -> Any:
    """Every layer rounded by itself, on what the wrapped model gives it."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, path=path: inputs.update({path: args[0].flatten(0, 1)}))
        for path, module in adapted(wrapped)
    ]
    logits(wrapped, CALIBRATION)
    for hook in hooks:
        hook.remove()
    result: Any = remove(copy.deepcopy(wrapped))
    for path, module in adapted(wrapped):
        X, layer = inputs[path], result.get_submodule(path)
        target, _ = module.adapter.merged(dense_weight(module.base), None)
        layer.recode(rounded(target.detach(), layer.scales(), X.T @ X, layer.codes()))
    return result


@pytest.mark.parametrize("target", ["all-linear", "all-linear@0,2"])
def test_each_layer_makes_up_for_the_rounding_of_those_before_it(
    make_gpt2: Callable[..., GPT2LMHeadModel], make_llama: Callable[..., LlamaForCausalLM], target: str
) -> None:
    for model in (make_llama(num_hidden_layers=3), make_gpt2(n_layer=3)):
        wrapped = slightly(quantize(model), {target: partial(LoRA, r=2)}, size=0.007)
        together, _ = into_nf4(wrapped)
        wanted = logits(wrapped, PROBE)
        assert (logits(together, PROBE) - wanted).norm() < 0.96 * (logits(alone(wrapped), PROBE) - wanted).norm()


def test_a_small_change_moves_codes_and_leaves_scales(llama: LlamaForCausalLM) -> None:
    wrapped = slightly(quantize(llama), {"q_proj": LoRA, "down_proj": LoRA}, size=0.006)
    before = {path: layer.twin(None) for path, layer in layers(wrapped).items()}
    merged, report = into_nf4(wrapped)
    after = layers(merged)
    assert after.keys() == before.keys()
    for path, layer in after.items():
        assert torch.equal(layer.scales(), before[path].scales())
        if path.endswith(("q_proj", "down_proj")):
            assert not torch.equal(layer.codes(), before[path].codes())
        else:
            assert torch.equal(layer.packed, before[path].packed)
    for site in report.sites:
        flipped = (after[site.path].codes() != before[site.path].codes()).float().mean()
        assert site.flipped == pytest.approx(float(flipped))
        assert site.share is not None
        assert 0 <= site.share <= 1
    assert "4-bit codes that changed" in str(report)


def test_a_merge_at_the_start_changes_no_byte(llama: LlamaForCausalLM) -> None:
    wrapped = apply(quantize(llama), plan(llama, LINEAR))
    merged, report = merge(wrapped, to="nf4", probe=PROBE)
    assert report.share == 1
    before = layers(wrapped)
    for path, layer in layers(merged).items():
        assert torch.equal(layer.packed, before[path].packed)
        assert torch.equal(layer.absmax, before[path].absmax)


def test_merging_leaves_the_wrapped_model_as_it_was(llama: LlamaForCausalLM) -> None:
    wrapped = slightly(quantize(llama.train()))
    before, state = logits(wrapped, PROBE), {n: t.detach().clone() for n, t in wrapped.state_dict().items()}
    generator = torch.get_rng_state()
    merged, _ = into_nf4(wrapped)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert torch.equal(logits(wrapped, PROBE), before)
    assert all(torch.equal(t, state[n]) for n, t in wrapped.state_dict().items())
    assert all(module.training for module in (*wrapped.modules(), *merged.modules()))
    assert torch.equal(torch.get_rng_state(), generator)
    for module in (*wrapped.modules(), *merged.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_of_a_dense_model_all_linear_layers_but_the_head_become_nf4(model: nn.Module) -> None:
    wrapped = slightly(model, {"c_attn": LoRA} if isinstance(model, GPT2LMHeadModel) else {"q_proj": LoRA})
    merged, report = into_nf4(wrapped)
    bare = quantize(remove(copy.deepcopy(wrapped)))
    assert layers(merged).keys() == layers(bare).keys()
    assert type(merged.get_output_embeddings()) is nn.Linear
    assert type(merged.get_input_embeddings()) is nn.Embedding
    assert len(report.sites) == 2
    assert all(site.flipped is None for site in report.sites)


@pytest.mark.parametrize("site", ["embedding", "lm_head"])
def test_head_and_embeddings_stay_dense_and_an_adapter_on_one_parts_them(gpt2: GPT2LMHeadModel, site: str) -> None:
    table = gpt2.lm_head.weight.detach().clone()
    wrapped = trained(quantize(gpt2), {site: LoRA})
    merged, report = into_nf4(wrapped)
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    assert (type(head), type(embeddings)) == (nn.Linear, nn.Embedding)
    assert torch.equal(head.weight, table) == (site == "embedding")
    assert torch.equal(embeddings.weight, table) == (site == "lm_head")
    assert not merged.config.tie_word_embeddings
    assert "tie_word_embeddings is off" in str(report)
    assert share(report) > 0.9999  # nothing of it is rounded
    tied, _ = into_nf4(slightly(remove(wrapped)))
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_an_adapter_that_would_be_lost_is_refused_by_its_share(llama: LlamaForCausalLM) -> None:
    wrapped = slightly(quantize(llama), size=0.002)
    before, state = logits(wrapped, PROBE), {n: t.detach().clone() for n, t in adapter_state(wrapped).items()}
    _, report = into_nf4(wrapped, method="naive")
    assert share(report) < 0.2
    message = rf"a share of {report.share:.3f} of the adapter's effect .*to=dense keeps it"
    with pytest.raises(RefusedError, match=message):
        into_nf4(wrapped, method="naive", min_share=0.5)
    assert torch.equal(logits(wrapped, PROBE), before)
    assert all(torch.equal(t, state[n]) for n, t in adapter_state(wrapped).items())
    into_nf4(wrapped, method="naive", min_share=0)


def test_what_full_fine_tuning_has_changed_cannot_be_measured_and_is_refused(llama: LlamaForCausalLM) -> None:
    tuned = trained(llama, {"*norm*": Full})
    with pytest.raises(RefusedError, match="cannot be measured"):
        into_nf4(tuned, min_share=0.5)
    merged, report = into_nf4(tuned)
    assert report.share is None
    assert len(layers(merged)) == 14


def test_a_bias_of_an_nf4_base_is_merged_dense(gpt2: GPT2LMHeadModel) -> None:
    for name, parameter in gpt2.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=key(0, name))
    wrapped = slightly(quantize(gpt2))
    merged, _ = into_nf4(wrapped)
    for path, layer in layers(merged).items():
        site: Any = wrapped.get_submodule(path)
        assert type(site) is Adapted
        assert layer.bias is not None
        held: Any = site.base.bias
        assert torch.equal(layer.bias, held)
        assert layer.bias is not held


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
@pytest.mark.parametrize("quantised", [True, False], ids=["nf4", "dense"])
def test_a_start_that_changed_the_base_is_merged_too(
    make_llama: Callable[[], LlamaForCausalLM], keep: bool, quantised: bool
) -> None:
    model: Any = quantize(make_llama()) if quantised else make_llama()
    init = "pissa" if quantised else "loftq"
    apply(model, plan(model, {"all-linear": partial(LoRA, r=4, init=init)}), keep_base=keep)
    for name, parameter in named_trainable(model).items():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=key(1, name)))
    merged, report = into_nf4(model)
    assert len(layers(merged)) == 14
    assert share(report) > 0.5


def test_a_layer_that_no_token_reaches_is_rounded_and_named(llama: LlamaForCausalLM) -> None:
    llama.model.spare = nn.Linear(32, 32)
    wrapped = slightly(quantize(llama), {"spare": LoRA, "q_proj": LoRA})
    merged, report = into_nf4(wrapped)
    assert "no calibration token reaches 1 layers" in str(report)
    target, _ = wrapped.model.spare.adapter.merged(wrapped.model.spare.base.dequantize(), None)
    assert torch.equal(merged.model.spare.packed, NF4Linear.from_dense(target.detach(), None, double=True).packed)


def test_a_model_of_no_blocks_is_calibrated_layer_by_layer() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    wrapped = slightly(model, size=0.03)
    with pytest.raises(RefusedError, match="cannot be measured"):
        merge(wrapped, to="nf4", calibration=CALIBRATION)
    with pytest.raises(ConfigError, match="method=best needs token ids"):
        merge(wrapped, to="nf4")
    merged, report = into_nf4(wrapped)
    rounding, _ = into_nf4(wrapped, method="naive")
    wanted = wrapped(PROBE)
    assert (merged(PROBE) - wanted).norm() < 0.8 * (rounding(PROBE) - wanted).norm()
    assert report.share is None


def test_the_default_calibration_is_the_probe(llama: LlamaForCausalLM) -> None:
    wrapped = slightly(quantize(llama))
    one, _ = into_nf4(wrapped, calibration=None)
    other, _ = into_nf4(wrapped, calibration=PROBE)
    for path, layer in layers(one).items():
        assert torch.equal(layer.packed, other.get_submodule(path).packed)
    merged, _ = merge(wrapped, to="nf4", min_share=None)  # keyed random tokens
    again, _ = merge(wrapped, to="nf4", min_share=None)
    assert torch.equal(merged.get_submodule(Q).packed, again.get_submodule(Q).packed)
