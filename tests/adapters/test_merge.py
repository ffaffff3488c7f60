"""Merging: a new model that computes the same, and an account of what it cost."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from merging import RULES, Q, logits, trained
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lowrank.adapters import Adapted, Adapter, Bottleneck, Full, LoRA, NotMergeable, Prompt, dense_weight
from lowrank.adapters.inject import adapter_state, apply, named_trainable
from lowrank.adapters.merge import merge
from lowrank.adapters.plan import Rules, plan
from lowrank.errors import ConfigError
from lowrank.keys import key
from lowrank.quant.convert import quantize


class Squared(Adapter):
    """No change of weight and bias."""

    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y + self.scale * y.square()


def test_the_merged_model_computes_what_the_wrapped_one_does(model: nn.Module, tokens: Tensor) -> None:
    base = logits(model, tokens)
    wrapped = trained(model.double())
    merged, _ = merge(wrapped)
    difference = (logits(merged, tokens) - logits(wrapped, tokens)).abs().max()
    assert (logits(wrapped, tokens) - base).abs().max() > 0.1
    assert difference < 2e-6  # Llama's norms compute in fp32 even in an fp64 model


def test_merging_is_exact_in_the_bases_own_dtype(gpt2_64: GPT2LMHeadModel, tokens: Tensor) -> None:
    wrapped = trained(gpt2_64).double()
    merged, report = merge(wrapped, probe=tokens)
    assert (logits(merged, tokens) - logits(wrapped, tokens)).abs().max() < 1e-12
    assert report.logit_difference is not None
    assert report.logit_difference < 1e-12


def test_merging_leaves_the_wrapped_model_as_it_was(model: nn.Module, tokens: Tensor) -> None:
    wrapped = trained(model)
    before, state = logits(wrapped, tokens), {n: t.detach().clone() for n, t in adapter_state(wrapped).items()}
    modules, requires = dict(wrapped.named_modules()), named_trainable(wrapped).keys()
    merged, _ = merge(wrapped)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert torch.equal(logits(wrapped, tokens), before)
    assert dict(wrapped.named_modules()) == modules
    assert named_trainable(wrapped).keys() == requires
    assert all(torch.equal(t, state[n]) for n, t in adapter_state(wrapped).items())


def test_the_merged_model_shares_no_hook_with_the_wrapped_one(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    wrapped = trained(llama)
    merged, _ = merge(wrapped)
    calls: list[nn.Module] = []
    merged.get_submodule(Q).register_forward_hook(lambda module, args, output: calls.append(module))
    logits(wrapped, tokens)
    assert not calls


def test_each_site_becomes_a_module_of_its_bases_own_kind(model: nn.Module) -> None:
    kinds = {name: type(module) for name, module in model.named_modules()}
    merged, _ = merge(trained(model))
    assert {name: type(module) for name, module in merged.named_modules()} == kinds
    assert not any(p.requires_grad for p in merged.parameters())


def test_a_merged_models_state_dict_loads_into_the_bare_one(model: nn.Module, tokens: Tensor) -> None:
    bare = type(model)(model.config).eval()
    merged, _ = merge(trained(model, {"all-linear": LoRA}))
    bare.load_state_dict(merged.state_dict())
    assert torch.equal(logits(bare, tokens), logits(merged, tokens))


def test_an_nf4_base_merges_into_a_dense_linear(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    wrapped = trained(quantize(llama), {"all-linear": LoRA})
    merged, _ = merge(wrapped)
    assert type(merged.get_submodule(Q)) is nn.Linear
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(merged, tokens), logits(wrapped, tokens), rtol=0, atol=1e-4)


def test_a_bias_survives_the_merge_of_an_nf4_base(gpt2: GPT2LMHeadModel, tokens: Tensor) -> None:
    for name, parameter in gpt2.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=key(0, name))
    wrapped = trained(quantize(gpt2), {"all-linear": LoRA})
    merged, _ = merge(wrapped)
    torch.testing.assert_close(logits(merged, tokens), logits(wrapped, tokens), rtol=0, atol=1e-4)


def test_an_adapter_on_a_tied_embedding_leaves_the_head_alone(gpt2: GPT2LMHeadModel, tokens: Tensor) -> None:
    table = gpt2.lm_head.weight.detach().clone()
    wrapped = trained(gpt2, {"embedding": LoRA})
    merged, report = merge(wrapped)
    assert torch.equal(merged.lm_head.weight, table)
    assert not torch.equal(merged.transformer.wte.weight, table)
    torch.testing.assert_close(logits(merged, tokens), logits(wrapped, tokens), rtol=0, atol=1e-4)
    assert not merged.config.tie_word_embeddings
    assert wrapped.config.tie_word_embeddings
    assert "tie_word_embeddings is off" in str(report)


def test_an_adapter_on_a_tied_head_leaves_the_embeddings_alone(gpt2: GPT2LMHeadModel, tokens: Tensor) -> None:
    table = gpt2.lm_head.weight.detach().clone()
    wrapped = trained(gpt2, {"lm_head": LoRA})
    merged, report = merge(wrapped)
    assert torch.equal(merged.transformer.wte.weight, table)
    assert not torch.equal(merged.lm_head.weight, table)
    torch.testing.assert_close(logits(merged, tokens), logits(wrapped, tokens), rtol=0, atol=1e-4)
    assert "tie_word_embeddings is off" in str(report)


def test_a_tie_that_no_adapter_touches_stays(gpt2: GPT2LMHeadModel) -> None:
    merged, report = merge(trained(gpt2, {"all-linear": LoRA}))
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings
    assert not report.notes


def test_the_report_says_how_far_each_weight_moved_and_what_rounding_took(llama: LlamaForCausalLM) -> None:
    wrapped = trained(llama.bfloat16(), {"all-linear": LoRA})
    weights = {path: module.base for path, module in wrapped.named_modules() if isinstance(module, Adapted)}
    merged, report = merge(wrapped)
    assert [site.path for site in report.sites] == list(weights)
    for site in report.sites:
        adapter = wrapped.get_submodule(site.path).adapter
        before, stored = (
            dense_weight(weights[site.path]).double(),
            dense_weight(merged.get_submodule(site.path)).double(),
        )
        exact = before + adapter.scale * (adapter.B.double() @ adapter.A.double()).detach()
        change = (exact - before).norm()
        assert site.change == pytest.approx(float(change / before.norm()), rel=1e-3)
        assert site.rounding == pytest.approx(float((stored - exact).norm() / change), rel=1e-3)
        assert site.rounding > 1e-4


def test_the_report_measures_logits_on_the_probe(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    wrapped = trained(llama.bfloat16())
    merged, report = merge(wrapped, probe=tokens)
    wanted = logits(wrapped, tokens)
    assert report.logit_scale == pytest.approx(float(wanted.abs().max()))
    assert report.logit_difference == pytest.approx(float((logits(merged, tokens) - wanted).abs().max()))


def test_a_merge_at_the_start_changes_no_bit(model: nn.Module, tokens: Tensor) -> None:
    before = logits(model, tokens)
    merged, report = merge(apply(model, plan(model, RULES)))
    assert torch.equal(logits(merged, tokens), before)
    assert all(site.change == site.rounding == 0 for site in report.sites)


def test_modes_are_kept(llama: LlamaForCausalLM) -> None:
    wrapped = trained(llama.train())
    merged, _ = merge(wrapped)
    assert all(module.training for module in wrapped.modules())
    assert all(module.training for module in merged.modules())


def test_a_method_that_is_no_weight_is_refused_by_site(llama: LlamaForCausalLM) -> None:
    wrapped = apply(llama, plan(llama, {"q_proj": Squared, "v_proj": LoRA}))
    with pytest.raises(NotMergeable, match=rf"^{Q}: Squared is not a change of weight and bias"):
        merge(wrapped)


@pytest.mark.parametrize("to", ["dense", "nf4"])
@pytest.mark.parametrize(
    ("rules", "where"),
    [
        ({"blocks": Bottleneck, "q_proj": LoRA}, "model.layers.0: Bottleneck wraps a LlamaDecoderLayer"),
        ({"backbone": Prompt, "all-linear": LoRA}, "model: Prompt wraps a LlamaModel"),
    ],
    ids=["blocks", "a backbone with LoRA inside"],
)
def test_what_wraps_more_than_a_layer_is_refused_by_site(
    llama: LlamaForCausalLM, rules: Rules, where: str, to: str
) -> None:
    wrapped = apply(llama, plan(llama, rules))
    with pytest.raises(NotMergeable, match=f"^{where}"):
        merge(wrapped, to=to)


def test_merging_draws_nothing_from_the_default_generator(llama: LlamaForCausalLM) -> None:
    wrapped, before = trained(llama), torch.get_rng_state()
    merge(wrapped)
    assert torch.equal(torch.get_rng_state(), before)


def test_full_fine_tuning_merges_into_a_copy(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    wrapped = trained(llama, {"*norm*": Full})
    merged, report = merge(wrapped)
    assert not report.sites
    assert torch.equal(logits(merged, tokens), logits(wrapped, tokens))
    assert {id(p) for p in merged.parameters()}.isdisjoint(id(p) for p in wrapped.parameters())


def test_a_model_without_a_vocabulary_reports_no_logits() -> None:
    wrapped: Any = nn.Sequential(nn.Linear(8, 8), Conv1D(4, 8))
    apply(wrapped, plan(wrapped, {"all-linear": partial(LoRA, r=2)}))
    x = torch.randn(3, 8, generator=key(0))
    merged, report = merge(wrapped)
    assert report.logit_difference is None
    assert math.isclose(float((merged(x) - wrapped(x)).detach().abs().max()), 0)


@pytest.mark.parametrize("probe", [[[1, 2], [3, 64]], [[-1, 2]], [["a", 2]], [[1, 2**70]], 7, [3, 4]])
def test_a_probe_of_tokens_that_the_model_does_not_have_is_refused(probe: Any, llama: LlamaForCausalLM) -> None:
    wrapped = apply(llama, plan(llama, {"embedding": LoRA}))  # 64 tokens
    with pytest.raises(ConfigError, match=r"merge: .*probe"):
        merge(wrapped, probe=probe)
