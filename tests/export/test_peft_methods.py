"""Every method that PEFT has too, both ways: what one writes the other reads, and computes the same."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from both_ways import IDS, QUIET, TENSORS, apart, config, of_peft, with_adapter
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import lowrank
from lowrank.adapters import IA3, OFT, AdaLoRA, DoRA, LoHa, LoKr, Prefix, Prompt, VeRA
from lowrank.adapters.base import dense_weight
from lowrank.adapters.inject import current_plan
from lowrank.adapters.sites import adapted, sites
from lowrank.errors import ConfigError
from lowrank.export.peft import export_peft, import_peft
from lowrank.keys import key
from lowrank.quant.convert import quantize

pytestmark = QUIET

# Ours: rules, and the type that PEFT is given. c_attn, c_fc and c_proj are Conv1D.
WRITTEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "dora": (
        "llama",
        {"q_proj": partial(DoRA, r=4, alpha=6), "*.1.*.up_proj": partial(DoRA, r=2, rslora=True)},
        "LORA",
    ),
    "dora, embeddings": ("gpt2", {"embedding": partial(DoRA, r=4), "c_fc": partial(DoRA, r=2)}, "LORA"),
    "adalora": ("llama", {"all-linear": partial(AdaLoRA, init_r=4, target_r=2, alpha=6)}, "ADALORA"),
    "adalora, conv1d": ("gpt2", {"c_attn": partial(AdaLoRA, dropout=0.1)}, "ADALORA"),
    "vera": ("llama", {"all-linear": partial(VeRA, r=8, d_initial=0.5)}, "VERA"),
    "vera, conv1d": ("gpt2", {"all-linear": partial(VeRA, r=8)}, "VERA"),
    "ia3": ("llama", {"k_proj": IA3, "v_proj": IA3, "down_proj": partial(IA3, feedforward=True)}, "IA3"),
    "ia3, conv1d": ("gpt2", {"c_attn": IA3, "*.mlp.c_proj": partial(IA3, feedforward=True)}, "IA3"),
    "loha": ("llama", {"*.0.*_proj": partial(LoHa, r=3, alpha=0.7), "*.1.*.q_proj": partial(LoHa, r=2)}, "LOHA"),
    "lokr": ("llama", {"q_proj": partial(LoKr, r=2, alpha=3), "up_proj": partial(LoKr, r=3)}, "LOKR"),
    "lokr, one right factor": (
        "llama",
        {"q_proj": partial(LoKr, r=9, factor=4), "up_proj": partial(LoKr, r=40, factor=4)},
        "LOKR",
    ),
    "oft": ("llama", {"all-linear": partial(OFT, block_size=8)}, "OFT"),
    "oft, neumann": ("llama", {"q_proj": partial(OFT, neumann=6)}, "OFT"),
    "oft, linear head": ("gpt2", {"lm_head": partial(OFT, block_size=16)}, "OFT"),
    "loha on conv1d": ("gpt2", {"all-linear": partial(LoHa, r=2)}, "LORA"),
    "lokr on conv1d": ("gpt2", {"c_attn": partial(LoKr, r=2), "c_fc": partial(LoKr, r=99)}, "LORA"),
    "prefix": ("llama", {"backbone": partial(Prefix, length=3)}, "PREFIX_TUNING"),
    "prefix, by a network": ("gpt2", {"backbone": partial(Prefix, length=3, hidden=5)}, "PREFIX_TUNING"),
    "prompt": ("llama", {"backbone": partial(Prompt, length=3)}, "PROMPT_TUNING"),
    "prompt, learnt positions": ("gpt2", {"backbone": partial(Prompt, length=3)}, "PROMPT_TUNING"),
}

LLAMA, GPT2 = ["q_proj", "v_proj", "down_proj"], ["c_attn", "c_fc", "mlp.c_proj"]

# PEFT's: the configuration's class and options, and the method that it is here.
READ: dict[str, tuple[str, str, dict[str, Any], type]] = {
    "dora": ("llama", "Lora", {"use_dora": True, "target_modules": LLAMA, "r": 4, "rank_pattern": {"v_proj": 2}}, DoRA),
    "dora, embeddings": (
        "gpt2",
        "Lora",
        {"use_dora": True, "use_rslora": True, "target_modules": ["wte", "c_fc"]},
        DoRA,
    ),
    "adalora": ("llama", "AdaLora", {"target_modules": LLAMA, "init_r": 3, "total_step": 10}, AdaLoRA),
    "adalora, conv1d": ("gpt2", "AdaLora", {"target_modules": GPT2, "lora_alpha": 3, "total_step": 10}, AdaLoRA),
    "vera": ("llama", "Vera", {"target_modules": LLAMA, "r": 8, "d_initial": 0.3}, VeRA),
    "vera, conv1d": ("gpt2", "Vera", {"target_modules": GPT2, "r": 8}, VeRA),
    "vera, from its key": (
        "llama",
        "Vera",
        {"target_modules": LLAMA, "save_projection": False, "projection_prng_key": 7},
        VeRA,
    ),
    "ia3": ("llama", "IA3", {"target_modules": LLAMA, "feedforward_modules": ["down_proj"]}, IA3),
    "ia3, as peft chooses": ("gpt2", "IA3", {}, IA3),
    "loha": (
        "llama",
        "LoHa",
        {"target_modules": LLAMA, "r": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        LoHa,
    ),
    "lokr": ("llama", "LoKr", {"target_modules": LLAMA, "r": 2, "alpha_pattern": {"v_proj": 5}}, LoKr),
    "lokr, one right factor": (
        "llama",
        "LoKr",
        {"target_modules": LLAMA, "r": 20, "decompose_factor": 4, "rank_pattern": {"q_proj": 30}},
        LoKr,
    ),
    "oft": ("llama", "OFT", {"target_modules": LLAMA, "oft_block_size": 16, "use_cayley_neumann": False}, OFT),
    "oft, neumann": ("llama", "OFT", {"target_modules": LLAMA, "oft_block_size": 0, "r": 4}, OFT),
    "oft, three terms": (
        "llama",
        "OFT",
        {"target_modules": LLAMA, "oft_block_size": 8, "num_cayley_neumann_terms": 3},
        OFT,
    ),
    "oft, linear head": ("gpt2", "OFT", {"target_modules": ["lm_head"]}, OFT),
    "prefix": ("gpt2", "PrefixTuning", {"num_virtual_tokens": 3}, Prefix),
    "prefix, by a network": ("llama", "PrefixTuning", {"num_virtual_tokens": 3, "prefix_projection": True}, Prefix),
    "prompt": ("llama", "PromptTuning", {"num_virtual_tokens": 3}, Prompt),
    "prompt, learnt positions": ("gpt2", "PromptTuning", {"num_virtual_tokens": 3}, Prompt),
}


def dequantized(bare: nn.Module, base: nn.Module) -> nn.Module:
    """``bare`` with the weights that an NF4 ``base`` computes with."""
    dense, layers = copy.deepcopy(bare), dict(sites(base))
    for path, layer in sites(dense):
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(dense_weight(layers[path]).clone(), requires_grad=False)
    return dense


@pytest.mark.parametrize(("kind", "rules", "peft_type"), WRITTEN.values(), ids=WRITTEN)
def test_peft_computes_what_we_wrote(kind: str, rules: Any, peft_type: str, tmp_path: Path, make_base: Any) -> None:
    bare = make_base(kind)
    ours = with_adapter(bare, rules)
    theirs = PeftModel.from_pretrained(copy.deepcopy(bare), export_peft(ours, tmp_path)).eval()
    assert config(tmp_path)["peft_type"] == peft_type
    assert apart(ours, theirs) <= 1e-5
    assert apart(ours, bare) > 1e-2


@pytest.mark.parametrize("method", [name for name, (kind, *_) in WRITTEN.items() if kind == "llama"])
def test_over_an_nf4_base_too(method: str, tmp_path: Path, make_base: Any) -> None:
    bare, (_, rules, _) = make_base("llama"), WRITTEN[method]
    base = quantize(copy.deepcopy(bare))
    ours, dense = with_adapter(base, rules), dequantized(bare, base)
    theirs = PeftModel.from_pretrained(dense, export_peft(ours, tmp_path)).eval()
    assert apart(ours, theirs) <= 1e-5
    back = import_peft(copy.deepcopy(base), tmp_path).eval()
    assert apart(ours, back) <= 1e-5


@pytest.mark.parametrize(("kind", "cls", "options", "method"), READ.values(), ids=READ)
def test_we_compute_what_peft_wrote(
    kind: str, cls: str, options: Any, method: type, tmp_path: Path, make_base: Any
) -> None:
    bare = make_base(kind)
    theirs = of_peft(bare, cls, **options)
    theirs.save_pretrained(tmp_path)
    ours = import_peft(copy.deepcopy(bare), tmp_path).eval()
    assert {type(site.adapter) for _, site in adapted(ours)} == {method}
    assert apart(ours, theirs) <= 1e-5
    assert apart(ours, bare) > 1e-2


@pytest.mark.parametrize(
    "method", [name for name, (*_, written_as) in WRITTEN.items() if written_as != "LORA" or "dora" in name]
)
def test_there_and_back_is_the_same_method_with_the_same_values(method: str, tmp_path: Path, make_base: Any) -> None:
    kind, rules, _ = WRITTEN[method]
    bare = make_base(kind)
    ours = with_adapter(bare, rules)
    back = import_peft(copy.deepcopy(bare), export_peft(ours, tmp_path))
    network = method == "prefix, by a network"  # its output is what is written
    assert [(r.path, r.method) for r in current_plan(back).rows] == [
        (r.path, r.method) for r in current_plan(ours).rows
    ]
    for (path, one), (_, other) in zip(adapted(ours), adapted(back), strict=True):
        before, after = one.adapter.state_dict(), other.adapter.state_dict()
        scale = one.adapter.scale if isinstance(one.adapter, DoRA) else 1.0
        for name in before if not network else ():
            wanted = before[name] * scale if name == "B" else before[name]
            torch.testing.assert_close(after[name], wanted, rtol=1e-6, atol=0, msg=f"{path}.{name}")


def test_the_triplets_that_pefts_allocator_dropped_are_zero_and_the_rest_are_in_their_places(
    tmp_path: Path, make_base: Any
) -> None:
    bare = make_base("llama")
    settings = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=LLAMA, init_r=4, target_r=2, total_step=6, tinit=1, tfinal=2
    )
    theirs = get_peft_model(copy.deepcopy(bare), settings)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    for step in range(6):
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path)
    kept = config(tmp_path)["rank_pattern"]
    assert sum(map(sum, kept.values())) == 2 * len(kept) == 12
    ours = import_peft(copy.deepcopy(bare), tmp_path).eval()
    for path, site in adapted(ours):
        adapter: Any = site.adapter
        assert (adapter.E != 0).tolist() == kept[f"{path}.lora_E"]
    again = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    assert apart(ours, again) <= 1e-5
    assert apart(ours, bare) > 1e-3


def test_an_inputs_path_that_ends_an_outputs_is_not_taken_for_it(tmp_path: Path) -> None:
    bare = nn.ModuleDict({"proj": nn.Linear(8, 8), "inner": nn.ModuleDict({"proj": nn.Linear(8, 8)})})
    ours = with_adapter(bare.requires_grad_(False), {"re:proj": partial(IA3, feedforward=True), "inner.proj": IA3})
    theirs = PeftModel.from_pretrained(copy.deepcopy(bare), export_peft(ours, tmp_path))
    x = torch.randn(3, 8, generator=key(0, "x"))
    for path in ("proj", "inner.proj"):
        ours_there, its = ours.get_submodule(path), theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(ours_there(x), its(x), rtol=0, atol=1e-6)


def test_one_of_several_adapters_is_written_by_its_name_and_read_beside_others(tmp_path: Path, make_base: Any) -> None:
    bare = make_base("llama")
    for name, one in {"a": partial(OFT, block_size=8), "b": partial(VeRA, r=4)}.items():
        export_peft(with_adapter(bare, {"q_proj": one}), tmp_path / name)
    model: Any = copy.deepcopy(bare)
    for name in ("a", "b"):
        import_peft(model, tmp_path / name, name=name)
    with pytest.raises(ConfigError, match=r"several adapters \(a, b\)"):
        export_peft(model, tmp_path / "none")
    for name in ("a", "b"):
        alone = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / name).eval()
        with lowrank.use(model, name):
            assert apart(model, alone) <= 1e-5
        export_peft(model, tmp_path / "again", name=name)
        assert config(tmp_path / "again") == config(tmp_path / name)
        assert load_file(tmp_path / "again" / TENSORS).keys() == load_file(tmp_path / name / TENSORS).keys()
