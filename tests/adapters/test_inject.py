"""Carrying out a plan: what apply and remove change, and what they leave."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lowrank.adapters import Adapted, Adapter, Full, LoRA
from lowrank.adapters.inject import adapter_state, apply, current_plan, named_trainable, remove
from lowrank.adapters.plan import InjectionPlan, Rules, plan
from lowrank.adapters.sites import sites
from lowrank.errors import ConfigError
from lowrank.keys import Clock
from lowrank.quant.convert import quantize

RULES: Rules = {"all-linear": partial(LoRA, r=2), "embedding": partial(LoRA, r=3)}


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits
    return found


def initial(model: nn.Module, path: str) -> Tensor:
    adapter = model.get_submodule(path).adapter
    assert isinstance(adapter, LoRA)
    return adapter.A.detach()


def test_a_wrapped_model_equals_its_base_bit_for_bit_at_the_start(model: nn.Module, tokens: Tensor) -> None:
    before = logits(model, tokens)
    assert apply(model, plan(model, RULES)) is model
    assert torch.equal(logits(model, tokens), before)


def test_exactly_the_planned_parameters_require_grad(model: nn.Module) -> None:
    made = plan(model, RULES)
    apply(model, made)
    names = {f"{row.path}.adapter.{which}" for row in made.rows for which in "AB"}
    assert named_trainable(model).keys() == names
    assert {id(p) for p in named_trainable(model).values()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in named_trainable(model).values())


def test_remove_puts_the_original_module_objects_back(model: nn.Module, tokens: Tensor) -> None:
    modules, before = dict(model.named_modules()), logits(model, tokens)
    apply(model, plan(model, RULES))
    assert remove(model) is model
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)
    assert torch.equal(logits(model, tokens), before)
    assert not any(p.requires_grad for p in model.parameters())


def test_adding_a_site_changes_the_initial_value_of_no_other(llama: LlamaForCausalLM) -> None:
    path = "model.layers.0.self_attn.q_proj"
    alone: Rules = {"q_proj": LoRA}
    first = initial(apply(llama, plan(llama, alone), seed=7), path).clone()
    others: list[Rules] = [{"v_proj": LoRA, "q_proj": LoRA}, {"all-linear": LoRA}]
    for more in others:
        remove(llama)
        assert torch.equal(initial(apply(llama, plan(llama, more), seed=7), path), first)
    remove(llama)
    assert not torch.equal(initial(apply(llama, plan(llama, alone), seed=8), path), first)


def test_every_site_starts_from_values_of_its_own(llama: LlamaForCausalLM) -> None:
    apply(llama, plan(llama, {"q_proj": LoRA}))
    first, second = (initial(llama, f"model.layers.{n}.self_attn.q_proj") for n in (0, 1))
    assert not torch.equal(first, second)


def test_applying_draws_nothing_from_the_default_generator(llama: LlamaForCausalLM) -> None:
    before = torch.get_rng_state()
    apply(llama, plan(llama, RULES))
    assert torch.equal(torch.get_rng_state(), before)


def test_names_are_those_of_the_bare_model_over_dense_and_nf4(llama: LlamaForCausalLM) -> None:
    bare = [path for path, _ in sites(llama)]
    rules: Rules = {"all-linear": partial(LoRA, r=2)}
    dense = list(named_trainable(apply(llama, plan(llama, rules))))
    assert [path for path, _ in sites(llama)] == bare
    assert "model.layers.0.self_attn.q_proj.adapter.A" in dense
    quantize(remove(llama))
    assert list(named_trainable(apply(llama, plan(llama, rules)))) == dense


def test_a_model_that_carries_adapters_refuses_more(llama: LlamaForCausalLM) -> None:
    made = plan(llama, {"q_proj": LoRA})
    wrapped = dict(apply(llama, made).named_modules())
    with pytest.raises(ConfigError, match="already carries adapters"):
        apply(llama, made)
    assert dict(llama.named_modules()) == wrapped


def test_a_plan_of_another_model_is_refused_with_nothing_changed(
    llama: LlamaForCausalLM, gpt2: GPT2LMHeadModel
) -> None:
    modules = dict(llama.named_modules())
    with pytest.raises(ConfigError, match=r"transformer\.wte \(32, 64\) is not a site of this model"):
        apply(llama, plan(gpt2, RULES))
    with pytest.raises(ConfigError, match="is not a parameter of this model"):
        apply(llama, plan(gpt2, {"*": Full}))
    assert dict(llama.named_modules()) == modules
    assert all(p.requires_grad for p in llama.parameters())


def test_an_adapter_takes_its_bases_mode(model: nn.Module) -> None:
    apply(model.train(), plan(model, {"all-linear": LoRA}))
    assert all(module.training for module in model.modules())
    remove(model)
    apply(model.eval(), plan(model, {"all-linear": LoRA}))
    assert not any(module.training for module in model.modules())


def test_the_clock_given_to_apply_is_every_adapters(llama: LlamaForCausalLM) -> None:
    clock = Clock(3)
    made = plan(llama, RULES)
    apply(llama, made, clock=clock)
    adapters = [module for module in llama.modules() if isinstance(module, Adapter)]
    assert len(adapters) == len(made.rows)
    assert all(adapter.clock is clock for adapter in adapters)
    assert [adapter.group for adapter in adapters] == [row.group for row in made.rows]


def test_a_wrapped_site_hides_its_bases_weight(llama: LlamaForCausalLM) -> None:
    apply(llama, plan(llama, {"q_proj": LoRA}))
    wrapped = llama.model.layers[0].self_attn.q_proj
    assert isinstance(wrapped, Adapted)
    with pytest.raises(
        AttributeError,
        match=r"the model reads \.weight of a 32×32 layer in model.layers.0.self_attn itself, past its LoRA",
    ):
        _ = wrapped.weight


@pytest.mark.parametrize("rules", [RULES, {"*": Full}, {"*norm*": Full, "q_proj": LoRA}], ids=["lora", "full", "both"])
def test_the_plan_a_model_carries_is_the_one_that_was_applied(llama: LlamaForCausalLM, rules: Rules) -> None:
    made = plan(llama, rules)
    assert current_plan(apply(llama, made)) == made


def test_a_plan_from_json_is_carried_out_the_same(llama: LlamaForCausalLM) -> None:
    made = plan(llama, RULES)
    read = InjectionPlan.from_dict(json.loads(json.dumps(made.to_dict())))
    first = {name: t.detach().clone() for name, t in adapter_state(apply(llama, made, seed=2)).items()}
    second = adapter_state(apply(remove(llama), read, seed=2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_full_wraps_nothing_and_trains_what_the_plan_names(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    modules, before = dict(llama.named_modules()), logits(llama, tokens)
    made = plan(llama, {"*norm*": Full})
    apply(llama, made)
    assert dict(llama.named_modules()) == modules
    assert named_trainable(llama).keys() == adapter_state(llama).keys() == {row.path for row in made.rows}
    assert torch.equal(logits(llama, tokens), before)


def test_removing_full_freezes_the_base_and_keeps_its_values(llama: LlamaForCausalLM) -> None:
    apply(llama, plan(llama, {"*norm*": Full}))
    with torch.no_grad():
        llama.model.norm.weight.add_(1)
    changed = llama.model.norm.weight.clone()
    remove(llama)
    assert torch.equal(llama.model.norm.weight, changed)
    assert not any(p.requires_grad for p in llama.parameters())


def test_full_and_an_adapter_can_share_a_model(llama: LlamaForCausalLM) -> None:
    apply(llama, plan(llama, {"q_proj": partial(LoRA, r=2), "*.q_proj.weight": Full}))
    names = [name for name in named_trainable(llama) if "layers.0" in name]
    path = "model.layers.0.self_attn.q_proj"
    assert names == [f"{path}.weight", f"{path}.adapter.A", f"{path}.adapter.B"]


def test_a_wrapped_model_follows_double_and_bfloat16(model: nn.Module, tokens: Tensor) -> None:
    apply(model, plan(model, RULES))
    for dtype in (torch.float64, torch.bfloat16):
        assert logits(model.to(dtype), tokens).dtype == dtype
        assert {p.dtype for p in named_trainable(model).values()} == {dtype}
