"""What PEFT has no method for, or no place in it, is a LoRA there if it can be one, and is refused if not."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from both_ways import QUIET, apart, config, drawn, of_peft, with_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lowrank.adapters import IA3, OFT, AdaLoRA, Adapter, BitFit, Bottleneck, DoRA, LoHa, LoKr, LoRA, Prefix, VeRA
from lowrank.adapters.base import dense_weight
from lowrank.adapters.sites import adapted
from lowrank.errors import ConfigError, RefusedError
from lowrank.export.peft import export_peft, import_peft
from lowrank.quant.convert import quantize
from lowrank.record.directory import Log
from lowrank.session.outcome import save_adapter

pytestmark = QUIET


def adapters(model: Any) -> list[Any]:
    return [site.adapter for _, site in adapted(model)]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_start_that_changed_the_base_is_a_lora_of_twice_the_rank_on_the_base_as_it_was(
    kind: str, init: str, rslora: bool, tmp_path: Path, make_base: Any
) -> None:
    bare = make_base(kind)
    ours = with_adapter(bare, {"all-linear": partial(LoRA, r=4, alpha=6, init=init, rslora=rslora)})
    theirs = PeftModel.from_pretrained(copy.deepcopy(bare), export_peft(ours, tmp_path)).eval()
    assert config(tmp_path)["r"] == 8
    assert config(tmp_path)["init_lora_weights"] is True
    assert apart(ours, theirs) <= 1e-5
    assert apart(ours, import_peft(copy.deepcopy(bare), tmp_path)) <= 1e-5
    assert apart(ours, bare) > 1e-2


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_saved_without_its_conversion_is_read_as_what_it_was_trained_as(
    init: str, tmp_path: Path, make_base: Any
) -> None:
    bare = make_base("llama")
    theirs = of_peft(bare, "Lora", r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=init)
    theirs.save_pretrained(tmp_path)
    ours = import_peft(copy.deepcopy(bare), tmp_path)
    assert {adapter.init for adapter in adapters(ours)} == {init}
    assert apart(ours, theirs) <= 1e-5


def test_and_with_its_conversion_as_a_plain_lora(tmp_path: Path, make_base: Any) -> None:
    bare = make_base("llama")
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")
    theirs = get_peft_model(copy.deepcopy(bare), settings)
    settings.init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    settings.init_lora_weights = "pissa"
    drawn({name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad})
    wanted = copy.deepcopy(theirs).eval()
    theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = import_peft(copy.deepcopy(bare), tmp_path / "end")
    assert {adapter.r for adapter in adapters(ours)} == {8}
    assert apart(ours, wanted) <= 1e-5


@pytest.mark.parametrize(("base", "init"), [("nf4", "pissa"), ("nf4", "olora"), ("dense", "loftq")])
def test_a_start_that_quantised_the_rest_anew_is_refused(base: str, init: str, tmp_path: Path, make_base: Any) -> None:
    bare = make_base("llama") if base == "dense" else quantize(make_base("llama"))
    ours = with_adapter(bare, {"q_proj": partial(LoRA, r=4, init=init)})
    with pytest.raises(ConfigError, match=rf"the start of .*q_proj \(init={init}\) changed the base and quantised"):
        export_peft(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class LoRAXS(Adapter):
    """h = W x + B R A x, with A and B from W, frozen."""

    sites = ("linear", "embedding")

    def __init__(self, base: nn.Module, *, generator: torch.Generator, r: int = 4) -> None:
        super().__init__()
        U, S, V = torch.linalg.svd(dense_weight(base).float(), full_matrices=False)
        self.A, self.B = nn.Parameter(V[:r].clone(), requires_grad=False), nn.Parameter(U[:, :r] * S[:r])
        self.B.requires_grad_(False)
        self.R = nn.Parameter(torch.zeros(r, r))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B @ self.R

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        A, B = self.factors()
        low = nn.functional.embedding(x, A.T) if isinstance(base, nn.Embedding) else x @ A.T
        return base(x) + low @ B.T


AS_LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "a user's own": ("llama", {"all-linear": LoRAXS}),
    "a user's own, conv1d and embedding": ("gpt2", {"all-linear": LoRAXS, "embedding": LoRAXS}),
    "several methods": ("llama", {"q_proj": LoRA, "k_proj": AdaLoRA, "v_proj": partial(VeRA, r=8), "up_proj": LoRAXS}),
    "several, one from its weight": ("llama", {"q_proj": partial(LoRA, init="pissa"), "up_proj": partial(LoHa, r=2)}),
    "two pairs of vera": ("llama", {"q_proj": partial(VeRA, r=8), "v_proj": partial(VeRA, r=4)}),
    "two budgets of adalora": ("llama", {"q_proj": AdaLoRA, "v_proj": partial(AdaLoRA, init_r=9, target_r=3)}),
    "two factors of lokr": ("llama", {"q_proj": partial(LoKr, factor=4), "v_proj": partial(LoKr, factor=2)}),
}


@pytest.mark.parametrize(("kind", "rules"), AS_LORA.values(), ids=AS_LORA)
def test_it_is_a_lora_of_its_factors(kind: str, rules: Any, tmp_path: Path, make_base: Any) -> None:
    bare = make_base(kind)
    ours = with_adapter(bare, rules)
    theirs = PeftModel.from_pretrained(copy.deepcopy(bare), export_peft(ours, tmp_path)).eval()
    assert config(tmp_path)["peft_type"] == "LORA"
    assert apart(ours, theirs) <= 1e-5
    assert apart(ours, bare) > 1e-2


def test_over_nf4_it_is_seen_that_the_architecture_has_conv1d_there(tmp_path: Path, make_base: Any) -> None:
    ours = with_adapter(quantize(make_base("gpt2")), {"c_attn": partial(LoHa, r=2)})
    export_peft(ours, tmp_path)
    assert config(tmp_path)["peft_type"] == "LORA"
    assert config(tmp_path)["fan_in_fan_out"] is True
    PeftModel.from_pretrained(make_base("gpt2"), tmp_path)


class Lifted(LoRAXS):
    """Its factors are not all of it."""

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        return 1.001 * super().forward(base, x)


class Rebased(LoRAXS):
    def rebased(self, base: nn.Module) -> nn.Module:
        return copy.deepcopy(base)


HINT = "`lowrank merge` writes the whole model instead."
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "oft on conv1d": ("gpt2", {"c_attn": OFT}, f"c_attn is a Conv1D, which PEFT's OFT does not take. {HINT}"),
    "two blocks of oft": (
        "llama",
        {"q_proj": OFT, "v_proj": partial(OFT, block_size=8)},
        "block_size is 16 on model.layers.0.self_attn.q_proj and 8 on model.layers.0.self_attn.v_proj, and PEFT has "
        f"one oft_block_size for all sites. {HINT}",
    ),
    "dora and lora": (
        "llama",
        {"q_proj": LoRA, "v_proj": DoRA},
        "v_proj carries DoRA, which is no LoRA. PEFT has one method for a whole model (DoRA, LoRA are here). " + HINT,
    ),
    "ia3 and a bottleneck": (
        "llama",
        {"k_proj": IA3, "blocks": Bottleneck},
        "model.layers.0 carries Bottleneck, which is no LoRA. "
        "PEFT has one method for a whole model (Bottleneck, IA3 are here).",
    ),
    "a bottleneck": ("llama", {"blocks": Bottleneck}, "model.layers.0 carries Bottleneck, which PEFT does not have."),
    "bitfit": ("gpt2", {"*.c_attn.bias": BitFit}, "c_attn.bias carries BitFit, which trains the base itself, and"),
    "prefix and lora": ("llama", {"backbone": Prefix, "q_proj": LoRA}, "PEFT has one method for a whole model"),
    "factors that are not all": ("llama", {"q_proj": Lifted}, "Lifted, which does not compute what its factors() say."),
    "a user's own change of the base": ("llama", {"q_proj": Rebased}, "Rebased, whose start changed the base."),
}


@pytest.mark.parametrize(("kind", "rules", "text"), REFUSED.values(), ids=REFUSED)
def test_what_peft_cannot_hold_is_refused_in_one_line_and_nothing_is_written(
    kind: str, rules: Any, text: str, tmp_path: Path, make_base: Any
) -> None:
    ours = with_adapter(make_base(kind), rules)
    with pytest.raises(ConfigError) as refused:
        export_peft(ours, tmp_path / "out")
    assert text in str(refused.value)
    assert str(refused.value).startswith("export: ")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_pefts_own_start_by_a_sketch_comes_back_as_another_model_and_is_refused_here(
    tmp_path: Path, make_base: Any
) -> None:
    bare = make_base("llama")
    options: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": "pissa_niter_4"}
    theirs = of_peft(bare, "Lora", **options)
    theirs.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    assert apart(again, theirs) > 0.1 * apart(theirs, bare)
    with pytest.raises(RefusedError, match='init_lora_weights: "pissa_niter_4" is not supported'):
        import_peft(copy.deepcopy(bare), tmp_path)


@pytest.mark.parametrize(
    ("rules", "note"),
    [
        ({"k_proj": IA3}, None),
        ({"blocks": Bottleneck}, "model.layers.0 carries Bottleneck, which PEFT does not have."),
    ],
)
def test_a_run_leaves_both_formats_or_says_in_one_line_why_not(
    rules: Any, note: str | None, tmp_path: Path, make_base: Any
) -> None:
    log = Log()
    save_adapter(with_adapter(make_base("llama"), rules), tmp_path, {}, None, log, step=1)
    assert (tmp_path / "adapter.safetensors").is_file()
    assert (tmp_path / "adapter_config.json").is_file() == (note is None)
    assert len(log.waiting) == (note is not None)
    assert note is None or f"adapter/ is in our own format alone: {note}" in log.waiting[0]
