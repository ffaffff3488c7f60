"""The plan: every site counted, every slip named, before any weight changes."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lowrank.adapters import IA3, Adapter, Full, LoRA, Prefix
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import InjectionPlan, Rules, plan
from lowrank.errors import ConfigError
from lowrank.quant.convert import quantize

LINEAR_OF_A_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Shared(Adapter):
    """y = W x + diag(d) P x with one frozen P for all sites of one shape, d zero (VeRA's form, cut down)."""

    @classmethod
    def shared(
        cls, shapes: dict[str, tuple[int, int]], *, generator: torch.Generator, **options: Any
    ) -> dict[str, Any]:
        [(rows, columns)] = set(shapes.values())
        values = torch.randn(rows, columns, generator=generator)
        return {"shared_P": nn.Parameter(values, requires_grad=False)}

    def __init__(self, base: nn.Module, *, generator: torch.Generator, shared_P: nn.Parameter, size: int = 1) -> None:
        super().__init__()
        self.P = shared_P
        self.d = nn.Parameter(torch.zeros(shared_P.shape[0]))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        return base(x) + self.d * (x @ self.P.T)


def paths(model: nn.Module, rules: Rules) -> list[str]:
    return [row.path for row in plan(model, rules).rows]


def refused(model: nn.Module, rules: Rules) -> str:
    before = dict(model.named_modules())
    with pytest.raises(ConfigError) as caught:
        plan(model, rules)
    assert dict(model.named_modules()) == before
    return str(caught.value)


def test_all_linear_is_every_linear_layer_but_the_head(llama: LlamaForCausalLM, gpt2: GPT2LMHeadModel) -> None:
    names = [path.rpartition(".")[2] for path in paths(llama, {"all-linear": LoRA})]
    assert names == LINEAR_OF_A_LAYER * 2
    conv = [path for path, module in gpt2.named_modules() if isinstance(module, Conv1D)]
    assert paths(gpt2, {"all-linear": LoRA}) == conv
    assert paths(quantize(llama), {"all-linear": LoRA}) == paths(copy.deepcopy(llama), {"all-linear": LoRA})


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 2),
        ("*.q_proj", 2),
        ("*.layers.1.*", 7),
        ("re:.*layers\\.0\\..*(q|v)_proj", 2),
        (nn.Linear, 15),
        (nn.Embedding, 1),
        ("embedding", 1),
        ("lm_head", 1),
        ("*", 16),  # of all modules, those that LoRA takes
    ],
)
def test_a_pattern_is_a_glob_a_bare_name_a_regular_expression_a_type_or_a_keyword(
    llama: LlamaForCausalLM, pattern: str | type[nn.Module], count: int
) -> None:
    assert len(paths(llama, {pattern: LoRA})) == count


def test_a_bare_name_is_the_whole_last_part_of_a_path(llama: LlamaForCausalLM) -> None:
    assert "'proj' matches no module" in refused(llama, {"proj": LoRA})
    assert "'_proj' matches no module" in refused(llama, {"_proj": LoRA})


def test_a_misspelt_target_among_right_ones_is_an_error(llama: LlamaForCausalLM) -> None:
    text = refused(llama, {"v_proj": LoRA, "q_porj": LoRA})
    assert text == "adapter.targets: 'q_porj' matches no module. Nearest: 'q_proj' (2 modules)."


def test_a_misspelt_glob_names_the_nearest_part(llama: LlamaForCausalLM) -> None:
    assert refused(llama, {"*.dwon_proj": LoRA}).endswith("Nearest: 'down_proj' (2 modules).")


def test_a_doubly_claimed_site_is_an_error_that_names_both_rules(llama: LlamaForCausalLM) -> None:
    text = refused(llama, {"q_proj": LoRA, "*.layers.0.*": partial(LoRA, r=2)})
    assert "'q_proj' and '*.layers.0.*' both claim model.layers.0.self_attn.q_proj" in text


def test_a_site_of_a_kind_the_adapter_does_not_take_is_an_error(llama: LlamaForCausalLM) -> None:
    assert "LlamaAttention" in refused(llama, {"self_attn": LoRA})
    assert "Shared adapts linear sites only" in refused(llama, {"embedding": Shared})
    text = refused(llama, {"embed_tokens": IA3})
    assert "IA3 adapts linear sites only" in text
    assert "Nearest: 'embed_tokens'" not in text
    assert refused(llama, {"q_proj": Prefix}).endswith("Prefix adapts backbone sites only. Its targets: backbone.")


def test_an_invalid_regular_expression_is_a_configuration_error(llama: LlamaForCausalLM) -> None:
    assert "'re:(q_proj'" in refused(llama, {"re:(q_proj": LoRA})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"r": 0}, "adapter.r: 0 is not allowed; a positive integer."),
        ({"r": 2.0}, "adapter.r: 2.0 is not allowed; a positive integer."),
        ({"r": True}, "adapter.r: true is not allowed; a positive integer."),
        ({"alpha": -1}, "adapter.alpha: -1 is not allowed; a positive number."),
        ({"alpha": float("nan")}, "adapter.alpha: nan is not allowed; a positive number."),
        ({"alpha": 1e300}, "adapter.alpha: 1e+300 is not allowed; a positive number within fp32's range."),
        ({"dropout": 1.0}, "adapter.dropout: 1.0 is not allowed; a number from 0 up to, but not including, 1."),
        ({"r": "8"}, "adapter.r: '8' is not allowed; a positive integer."),
        ({"rslora": "yes"}, "adapter.rslora: 'yes' is not allowed; true or false."),
        ({"rnak": 8}, "adapter.rnak: unknown key. Allowed: r, alpha, dropout, rslora"),
        ({"drpout": 0.1}, "adapter.drpout: unknown key. Did you mean 'dropout'? Allowed: r, alpha, dropout, rslora"),
    ],
)
def test_a_bad_option_is_an_error_of_the_plan(llama: LlamaForCausalLM, options: dict[str, Any], text: str) -> None:
    assert refused(llama, {"q_proj": partial(LoRA, **options)}).startswith(text)


def test_a_factory_that_is_no_adapter_class_is_an_error(llama: LlamaForCausalLM) -> None:
    rules: Any = {"q_proj": nn.Linear}
    assert "neither an Adapter class nor functools.partial of one" in refused(llama, rules)


@pytest.mark.parametrize(
    ("rules", "exclude", "text"),
    [
        ("q_proj", (), "'q_proj' is not allowed; a mapping"),
        ({5: LoRA}, (), "5 is not a pattern"),
        ({"q_proj": LoRA}, "q_proj", "adapter.exclude: 'q_proj' is not allowed; a list of patterns."),
        ({"q_proj": LoRA}, (None,), "None is not a pattern"),
        ({"q_proj": partial(LoRA, 4)}, (), r"LoRA: \(4,\) is not allowed; options have names, such as r=8\."),
    ],
)
def test_what_is_no_rule_is_an_error(llama: LlamaForCausalLM, rules: Any, exclude: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        plan(llama, rules, exclude)


def test_a_module_at_two_places_is_refused_because_one_of_them_would_be_bare() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Linear(4, 4), layer)
    assert "'0' matches 0, a module that stands at 2 places" in refused(model, {"0": LoRA})
    assert [row.path for row in plan(model, {"1": LoRA}).rows] == ["1"]


def test_counts_are_those_of_the_adapters_that_apply_builds(model: nn.Module) -> None:
    rules: Rules = {"all-linear": partial(LoRA, r=3), "embedding": partial(LoRA, r=2)}
    made = plan(model, rules)
    total = sum(p.numel() for p in model.parameters())
    assert made.total_parameters == total
    apply(model, made)
    assert made.trainable_parameters == sum(p.numel() for p in named_trainable(model).values())
    for row in made.rows:
        assert row.parameters == row.options["r"] * sum(row.shape)


def test_a_plan_is_the_same_on_the_meta_device(llama: LlamaForCausalLM) -> None:
    rules: Rules = {"all-linear": partial(LoRA, r=3)}
    with torch.device("meta"):
        empty = LlamaForCausalLM(llama.config)
    assert plan(empty, rules) == plan(llama, rules)
    assert plan(quantize(empty), rules) == plan(quantize(llama), rules)


def test_quantised_weights_count_by_their_logical_shape(model: nn.Module) -> None:
    total = sum(p.numel() for p in model.parameters())
    assert plan(quantize(model), {"all-linear": LoRA}).total_parameters == total


def test_sites_stand_in_the_order_of_the_model_whatever_the_order_of_the_rules(llama: LlamaForCausalLM) -> None:
    one: Rules = {"v_proj": LoRA, "q_proj": LoRA}
    other: Rules = {"q_proj": LoRA, "v_proj": LoRA}
    assert plan(llama, one) == plan(llama, other)


def test_a_plan_prints_every_site_and_its_totals(llama: LlamaForCausalLM) -> None:
    made = plan(llama, {"*.q_proj": partial(LoRA, r=8), "*.v_proj": partial(LoRA, r=4)})
    text = str(made)
    for row in made.rows:
        [line] = [line for line in text.splitlines() if line.startswith(f"{row.path} ")]
        assert f"{row.shape[0]}×{row.shape[1]}" in line
        assert f"LoRA(r={row.options['r']})" in line
        assert line.endswith(f" {row.parameters:,}")
    assert f"4 rows, {made.trainable_parameters:,} trainable parameters" in text
    assert f"{made.total_parameters:,}" in text


def test_a_plan_goes_through_json_unchanged(llama: LlamaForCausalLM) -> None:
    made = plan(llama, {"all-linear": partial(LoRA, r=2, alpha=3.5, rslora=True)})
    assert InjectionPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_sites_of_one_parent_with_one_width_share_a_group(llama: LlamaForCausalLM) -> None:
    groups = {row.path: row.group for row in plan(llama, {"all-linear": LoRA}).rows}
    layer = "model.layers.0"
    attention = [groups[f"{layer}.self_attn.{name}"] for name in ("q_proj", "k_proj", "v_proj")]
    assert len(set(attention)) == 1
    assert groups[f"{layer}.mlp.gate_proj"] == groups[f"{layer}.mlp.up_proj"] != groups[f"{layer}.mlp.down_proj"]
    assert groups[f"{layer}.self_attn.q_proj"] != groups["model.layers.1.self_attn.q_proj"]


def test_3d_expert_weights_are_named_as_not_covered() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 8, 8))

    made = plan(nn.Sequential(nn.Linear(8, 8), Experts(), nn.Conv1d(2, 2, 3)), {"all-linear": LoRA})
    assert made.notes == ("not covered: 3D expert weights: 256 parameters in 1 sites",)
    assert made.notes[0] in str(made)


def test_full_names_parameters_by_glob_bare_name_or_module(llama: LlamaForCausalLM, gpt2: GPT2LMHeadModel) -> None:
    assert paths(llama, {"*": Full}) == [name for name, _ in llama.named_parameters()]
    assert paths(gpt2, {"*": Full}) == [name for name, _ in gpt2.named_parameters()]  # the tied head once
    norms = [name for name, _ in llama.named_parameters() if "norm" in name]
    assert paths(llama, {"*norm*": Full}) == norms
    assert paths(gpt2, {"bias": Full}) == [name for name, _ in gpt2.named_parameters() if name.endswith(".bias")]
    assert paths(llama, {"q_proj": Full}) == [f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)]
    assert "'*.biass' matches no parameter of this GPT2LMHeadModel. Nearest: 'bias'" in refused(gpt2, {"*.biass": Full})


def test_full_refuses_quantised_weights(llama: LlamaForCausalLM) -> None:
    assert "NF4 weights cannot train (14 sites" in refused(quantize(llama), {"*": Full})


def test_an_adapter_that_shares_values_between_sites_is_planned_and_applied(llama: LlamaForCausalLM) -> None:
    made = plan(llama, {"q_proj": partial(Shared, size=2)})
    assert made.trainable_parameters == 2 * 32
    apply(llama, made, seed=1)
    first, second = (llama.model.layers[n].self_attn.q_proj.adapter for n in (0, 1))
    assert first.P is second.P
