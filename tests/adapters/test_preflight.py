"""The checks before step 1, each passing on what is right and naming what is wrong."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowrank.adapters import Adapter, Full, LoRA, NotMergeable
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import InjectionPlan, Rules, plan
from lowrank.adapters.preflight import check_gradients, check_identity, check_subclasses, check_trainable
from lowrank.errors import ConfigError
from lowrank.quant.convert import quantize

RULES: Rules = {"all-linear": partial(LoRA, r=2), "embedding": partial(LoRA, r=3)}


class Louder(Adapter):
    """Promises to start as the identity and does not."""

    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 1.001))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y * self.scale

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale, None if bias is None else bias * self.scale


class HonestlyLouder(Louder):
    identity_at_start = "rounding"


class OfOutputs(Louder):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotMergeable("it acts on outputs")


class Deaf(LoRA):
    """Its parameters never reach the output."""

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 8 * super().forward(input)


class Plain(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class PlainEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits
    return found


def identity(model: nn.Module, rules: Rules, tokens: Tensor) -> None:
    before = logits(model, tokens)
    apply(model, plan(model, rules))
    check_identity(model, before, logits(model, tokens))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return list(named_trainable(model).values())


def test_a_model_of_lora_passes_every_check(model: nn.Module, tokens: Tensor) -> None:
    made = plan(model, RULES)
    identity(model, RULES, tokens)
    check_trainable(model, made, trainable(model))
    check_subclasses(model)
    model(input_ids=tokens).logits.float().square().mean().backward()
    check_gradients(model)


def test_lora_over_nf4_passes_every_check(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    test_a_model_of_lora_passes_every_check(quantize(llama), tokens)


def test_an_adapter_that_breaks_its_promise_of_identity_is_found(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    with pytest.raises(ConfigError, match="differs from its base before training"):
        identity(llama, {"q_proj": Louder}, tokens)


def test_an_adapter_that_promises_only_rounding_is_let_through(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    identity(llama, {"q_proj": HonestlyLouder}, tokens)


def test_a_probe_that_is_not_finite_is_left_to_the_loop(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    nn.init.constant_(llama.lm_head.weight, float("inf"))
    identity(llama, {"q_proj": LoRA}, tokens)


def test_a_stray_trainable_parameter_is_found(llama: LlamaForCausalLM) -> None:
    made = plan(llama, {"q_proj": LoRA})
    apply(llama, made)
    llama.model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="but the plan has"):
        check_trainable(llama, made, trainable(llama))


def test_a_planned_parameter_that_does_not_train_is_found(llama: LlamaForCausalLM) -> None:
    made = plan(llama, {"q_proj": LoRA})
    apply(llama, made)
    trainable(llama)[0].requires_grad_(False)
    with pytest.raises(ConfigError, match="but the plan has"):
        check_trainable(llama, made, trainable(llama))


def test_a_swap_of_equal_size_is_found(llama: LlamaForCausalLM) -> None:
    """One planned tensor frozen and a stray one of the same size trained: the totals agree."""
    made = plan(llama, {"*.layers.0.self_attn.q_proj": partial(LoRA, r=1)})
    apply(llama, made)
    next(p for p in trainable(llama) if p.numel() == 32).requires_grad_(False)
    llama.model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="pre-flight"):
        check_trainable(llama, made, trainable(llama))


@pytest.mark.parametrize("which", ["none", "twice", "other"])
def test_a_parameter_in_no_optimizer_group_or_in_two_is_found(which: str, llama: LlamaForCausalLM) -> None:
    made: InjectionPlan = plan(llama, {"q_proj": LoRA})
    first, *rest = trainable(apply(llama, made))
    grouped = {"none": rest, "twice": [first, first, *rest], "other": [llama.model.norm.weight, *rest]}[which]
    with pytest.raises(ConfigError, match="in no optimizer group, or in two"):
        check_trainable(llama, made, grouped)


def test_full_passes_with_its_own_parameters(llama: LlamaForCausalLM) -> None:
    made = plan(llama, {"*": Full})
    check_trainable(apply(llama, made), made, list(llama.parameters()))


def test_an_adapter_that_never_gets_a_gradient_is_found_by_site(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    apply(llama, plan(llama, {"v_proj": LoRA, "*.layers.1.self_attn.q_proj": Deaf}))
    llama(input_ids=tokens).logits.square().mean().backward()
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.self_attn\.q_proj: no parameter of Deaf gets a gradient"):
        check_gradients(llama)


def test_gradients_that_are_not_finite_are_left_to_the_loop(llama: LlamaForCausalLM) -> None:
    for parameter in trainable(apply(llama, plan(llama, RULES))):
        parameter.grad = torch.full_like(parameter, float("nan"))
    check_gradients(llama)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_subclass_that_computes_x_w_plus_b_is_accepted(dtype: torch.dtype) -> None:
    model = nn.Sequential(PlainEmbedding(9, 8), Plain(8, 8), nn.Linear(8, 8)).to(dtype)
    check_subclasses(apply(model, plan(model, {"*": partial(LoRA, r=2)})))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("site", [Scaled(8, 8), ScaledEmbedding(9, 8)], ids=["linear", "embedding"])
def test_a_subclass_that_computes_something_else_is_refused_by_site(site: nn.Module, dtype: torch.dtype) -> None:
    model = nn.Sequential(site).to(dtype)
    apply(model, plan(model, {"*": partial(LoRA, r=2)}))
    with pytest.raises(ConfigError, match=f"0 is a {type(site).__name__} whose forward is not"):
        check_subclasses(model)


def test_a_method_that_changes_no_weight_takes_any_subclass() -> None:
    model = nn.Sequential(Scaled(8, 8))
    check_subclasses(apply(model, plan(model, {"*": OfOutputs})))


def test_checking_leaves_modes_and_the_default_generator_alone() -> None:
    model = nn.Sequential(Plain(8, 8)).train()
    apply(model, plan(model, {"*": partial(LoRA, r=2, dropout=0.5)}))
    before = torch.get_rng_state()
    check_subclasses(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
