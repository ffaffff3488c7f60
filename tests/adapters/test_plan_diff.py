"""What differs between two plans, told once for all the sites that differ alike."""

from __future__ import annotations

import json
from functools import partial

import pytest
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lowrank.adapters import Full, LoRA
from lowrank.adapters.plan import InjectionPlan, Rules, plan
from lowrank.adapters.sites import matched, short_names
from lowrank.quant.convert import quantize


def lines(model: nn.Module, first: Rules, second: Rules) -> list[str]:
    return str(plan(model, first).diff(plan(model, second))).splitlines()


def test_equal_plans_are_the_same(model: nn.Module) -> None:
    made = plan(model, {"all-linear": partial(LoRA, r=3)})
    again = InjectionPlan.from_dict(json.loads(json.dumps(made.to_dict())))
    assert made.diff(again).same
    assert str(made.diff(again)) == "the plans are the same"


def test_one_change_of_all_layers_is_one_line(llama: LlamaForCausalLM) -> None:
    first: Rules = {"q_proj": partial(LoRA, r=8, alpha=16), "v_proj": partial(LoRA, r=4)}
    second: Rules = {"q_proj": partial(LoRA, r=16, alpha=16), "v_proj": partial(LoRA, r=4)}
    assert lines(llama, first, second) == [
        "changed:",
        "  *.q_proj (2 sites): r 8 → 16; parameters 512 → 1,024",
        "rows 4, trainable parameters 1,408 → 2,432",
    ]


def test_what_is_in_one_plan_alone_is_listed_with_what_it_is(llama: LlamaForCausalLM) -> None:
    first: Rules = {"q_proj": partial(LoRA, r=8), "k_proj@0": partial(LoRA, r=2)}
    second: Rules = {"q_proj": partial(LoRA, r=8), "norm": Full}
    assert lines(llama, first, second) == [
        "only in the first:",
        "  model.layers.0.self_attn.k_proj: LoRA(r=2) on 16×32, 96 parameters",
        "only in the second:",
        "  model.norm.weight: Full on 32, 32 parameters",
        "rows 3, trainable parameters 1,120 → 1,056",
    ]


def test_sites_of_some_layers_are_named_by_a_pattern_that_matches_them_alone(llama: LlamaForCausalLM) -> None:
    deep = type(llama)(type(llama.config)(**{**llama.config.to_dict(), "num_hidden_layers": 6}))
    first: Rules = {"q_proj": partial(LoRA, r=2)}
    second: Rules = {"q_proj@0-2,5": partial(LoRA, r=3), "q_proj@3,4": partial(LoRA, r=2)}
    [line] = [line for line in lines(deep, first, second) if "sites" in line]
    assert line == "  *.q_proj@0-2,5 (4 sites): r 2 → 3; parameters 128 → 192"
    pattern = line.split()[0]
    assert [path.split(".")[2] for path in matched(deep, pattern)] == ["0", "1", "2", "5"]


def test_another_method_an_option_left_to_its_default_and_another_kind_of_site_are_told(
    llama: LlamaForCausalLM,
) -> None:
    before = plan(llama, {"q_proj": partial(LoRA, r=8), "*.k_proj.weight": Full})
    changed = plan(llama, {"q_proj": LoRA, "k_proj": partial(LoRA, r=1)})
    text = str(before.diff(changed))
    assert "  *.q_proj (2 sites): r 8 → by default" in text
    assert "  *.k_proj.weight (2 sites): Full on 16×32, 512 parameters" in text
    quantised = plan(quantize(llama), {"q_proj": LoRA})
    dense = InjectionPlan(tuple(row for row in changed.rows if row.method == "LoRA"), changed.total_parameters)
    assert "site Linear → NF4Linear" in str(dense.diff(quantised))


def test_what_is_beside_the_rows_is_told_too(llama: LlamaForCausalLM) -> None:
    made = plan(llama, {"q_proj": LoRA})
    other = InjectionPlan(made.rows[::-1], 7, ("a note",))
    text = str(made.diff(other))
    assert not made.diff(other).same
    assert f"the base's parameters {made.total_parameters:,} → 7" in text
    assert "only in the second: a note" in text
    assert "their rows stand in another order" in text


@pytest.mark.parametrize("swap", [False, True])
def test_every_row_is_in_exactly_one_part_of_a_diff(llama: LlamaForCausalLM, swap: bool) -> None:
    one = plan(llama, {"all-linear@0": partial(LoRA, r=2), "lm_head": LoRA})
    other = plan(llama, {"all-linear": partial(LoRA, r=3), "*norm*": Full})
    first, second = (other, one) if swap else (one, other)
    found = first.diff(second)
    assert {row.path for row in found.only_first} == {r.path for r in first.rows} - {r.path for r in second.rows}
    assert {row.path for row in found.only_second} == {r.path for r in second.rows} - {r.path for r in first.rows}
    assert [row.path for row, _ in found.changed] == [f"{path}" for path in matched(llama, "all-linear@0")]


def test_a_name_is_the_shortest_that_tells_one_kind_of_site_from_all_others(gpt2: GPT2LMHeadModel) -> None:
    rows = plan(gpt2, {"all-linear": LoRA, "embedding": LoRA}).rows
    names = short_names(row.path for row in rows)
    assert set(names.values()) == {"wte", "wpe", "c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}
    for row in rows:
        same = {path for path, name in names.items() if name == names[row.path]}
        assert set(matched(gpt2, f"*.{names[row.path]}")) == same
    assert short_names(["model.layers.0", "model.layers.11", "x"]) == {
        "model.layers.0": "blocks",
        "model.layers.11": "blocks",
        "x": "x",
    }
    assert list(short_names(["weight", "h.0.weight", "norm.weight"]).values()) == [
        "weight",
        "h.*.weight",
        "norm.weight",
    ]


def test_lists_of_one_name_in_two_places_keep_their_places() -> None:
    names = short_names(["encoder.layers.0.q", "decoder.layers.0.q", "decoder.layers.1.q"])
    assert set(names.values()) == {"encoder.layers.*.q", "decoder.layers.*.q"}
