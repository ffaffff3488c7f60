"""What `lowrank inspect adapter` prints and writes."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from lowrank import disable, load_adapter, save_adapter, use
from lowrank.adapters import Bottleneck, Full, LoRA
from lowrank.adapters.inject import apply
from lowrank.adapters.plan import Rules, plan
from lowrank.adapters.sites import adapted
from lowrank.errors import ConfigError
from lowrank.inspect import spectra


def trained(model: nn.Module, rules: Rules, seed: int = 0) -> nn.Module:
    apply(model, plan(model, rules), seed)
    generator = torch.Generator().manual_seed(seed)
    for _, module in adapted(model):
        for parameter in module.adapter.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def cells(text: str, start: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"{start} ")]
    return line.split()


def test_the_table_has_a_line_a_site_by_path_and_the_means_of_each_name(llama: LlamaForCausalLM) -> None:
    deep = type(llama)(type(llama.config)(**{**llama.config.to_dict(), "num_hidden_layers": 11}))
    found = spectra([trained(deep, {"q_proj": partial(LoRA, r=3), "v_proj@10": partial(LoRA, r=1)})])
    lines = str(found).splitlines()
    q = [f"model.layers.{n}.self_attn.q_proj" for n in range(11)]
    assert [line.split()[0] for line in lines[1:13]] == [*q, "model.layers.10.self_attn.v_proj"]
    assert [line.partition("  ")[0] for line in lines[13:]] == ["mean of q_proj (11)", "mean of v_proj (1)"]
    by_path = {site.path: site for site in found.models[0].sites}
    one = by_path[q[10]]
    assert one.singular is not None
    shown = [f"{value:.2e}" for value in (one.change, *one.singular)]
    assert cells(str(found), q[10])[1:] == ["LoRA", "32×32", *shown, *(f"{r:.2f}" for r in ranks(one))]
    mean = sum(by_path[path].change for path in q) / 11
    assert f"{mean:.2e}" in lines[13]


def ranks(site: Any) -> tuple[float, float]:
    return site.effective_rank, site.stable_rank


def test_json_holds_the_table_and_more(llama: LlamaForCausalLM) -> None:
    found = spectra([trained(llama, {"all-linear": partial(LoRA, r=3)})])
    tree = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    [learnt] = tree["models"]
    assert [(row["path"], row["change"]) for row in learnt["sites"]] == [
        (site.path, site.change) for site in found.models[0].sites
    ]
    assert {(row["type"], row["layer"]) for row in learnt["sites"] if "down" in row["path"]} == {
        ("down_proj", 0),
        ("down_proj", 1),
    }
    assert {row["type"]: row["sites"] for row in learnt["types"]}["gate_proj"] == 2
    assert tree["overlaps"] == []


def test_an_adapter_that_is_no_change_of_a_weight_shows_the_norms_of_its_parameters(llama: LlamaForCausalLM) -> None:
    found = spectra([trained(llama, {"blocks@0": partial(Bottleneck, size=4)})])
    assert found.models[0].sites == ()
    [other] = found.models[0].others
    down = float(llama.model.layers[0].adapter.down.detach().norm())
    assert other.norms["down"] == pytest.approx(down)
    assert str(found).startswith(f"model.layers.0  Bottleneck  ‖down‖ {down:.2e}, ‖down_bias‖ ")


def test_the_base_s_own_parameters_are_said_to_be_unknown(llama: LlamaForCausalLM) -> None:
    found = spectra([trained(llama, {"norm": Full})])
    assert str(found) == (
        "1 tensors of the base train themselves (Full, 32 values): what they were before is not kept, so how far they "
        "moved is not known"
    )


def test_a_bare_model_is_refused(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match="the model carries no adapter"):
        spectra([llama])


def test_two_models_show_both_changes_and_how_far_their_directions_agree(llama: LlamaForCausalLM) -> None:
    first = trained(llama, {"q_proj": partial(LoRA, r=2), "k_proj@0": partial(LoRA, r=2)})
    second = trained(type(llama)(llama.config), {"q_proj": partial(LoRA, r=4), "norm": Full}, seed=1)
    found = spectra([first, second])
    assert [one.path for one in found.overlaps] == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    one = found.overlaps[0]
    ends = [f"{grid[at][at]:.2f}" for at in (0, -1) for grid in (one.left, one.right)]
    row = cells(str(found), one.path)
    assert row[1:3] == [f"{model.sites[i].change:.2e}" for model, i in zip(found.models, (1, 0), strict=True)]
    assert row[5:] == [*ends, f"{4 / 32:.2f}"]  # 4 of 32 directions are shared by chance
    lines = str(found).splitlines()
    assert "only in the first: model.layers.0.self_attn.k_proj" in lines
    assert lines[-1].startswith("second: 1 tensors of the base train themselves")
    itself = spectra([first, first])
    assert cells(str(itself), one.path)[5:9] == ["1.00"] * 4
    assert len(json.loads(json.dumps(found.to_dict()))["overlaps"]) == 2


def test_an_untrained_adapter_has_no_directions_to_compare(llama: LlamaForCausalLM) -> None:
    first = trained(llama, {"q_proj": LoRA})
    fresh = type(llama)(llama.config)
    apply(fresh, plan(fresh, {"q_proj": LoRA}))
    found = spectra([first, fresh])
    assert found.overlaps == ()
    row = cells(str(found), "model.layers.0.self_attn.q_proj")
    assert row[2] == "0.00e+00"
    assert len(row) == 5  # the overlap's columns are empty


def test_models_of_unlike_shapes_are_refused(llama: LlamaForCausalLM) -> None:
    wide = type(llama)(type(llama.config)(**{**llama.config.to_dict(), "intermediate_size": 64}))
    pair = [trained(llama, {"up_proj": LoRA}), trained(wide, {"up_proj": LoRA})]
    with pytest.raises(ConfigError, match=r"up_proj is \(48, 32\) in one model and \(64, 32\) in the other"):
        spectra(pair)


def test_of_several_adapters_the_one_in_use_is_shown(llama: LlamaForCausalLM, tmp_path: Any) -> None:
    fresh = type(llama)(llama.config)
    fresh.load_state_dict(llama.state_dict())
    alone = str(spectra([trained(llama, {"q_proj": partial(LoRA, r=2)})]))
    save_adapter(llama, tmp_path / "a")
    save_adapter(trained(type(llama)(llama.config), {"v_proj": partial(LoRA, r=3)}), tmp_path / "b")
    load_adapter(fresh, tmp_path / "a", name="a")
    load_adapter(fresh, tmp_path / "b", name="b")
    with use(fresh, "a"):
        assert str(spectra([fresh])) == alone
    with use(fresh, "b"):
        assert {site.path.rpartition(".")[2] for site in spectra([fresh]).models[0].sites} == {"v_proj"}
    for model in (fresh, llama):
        with disable(model), pytest.raises(ConfigError, match="carries no adapter"):
            spectra([model])


def test_what_would_cost_too_much_is_left_out_and_said(llama: LlamaForCausalLM) -> None:
    found = spectra([trained(llama, {"q_proj": LoRA})], most=1)
    assert found.models[0].notes == (
        "2 sites: singular values left out for their cost; `lowrank inspect adapter` computes them",
    )
    assert cells(str(found), "model.layers.0.self_attn.q_proj")[3:] == [f"{found.models[0].sites[0].change:.2e}"]
