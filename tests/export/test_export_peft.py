"""What we write, PEFT reads, and computes the same."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from both_ways import QUIET
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from lowrank.adapters import Adapter, LoRA
from lowrank.adapters.inject import apply
from lowrank.adapters.methods.full import Full
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import adapted
from lowrank.errors import ConfigError
from lowrank.export.peft import export_peft, import_peft
from lowrank.quant.convert import quantize

pytestmark = QUIET

SITES = {
    "one rank": ("llama", {"q_proj": {"r": 4}, "v_proj": {"r": 4}}),
    "mixed": (
        "llama",
        {"q_proj": {"r": 8, "alpha": 3.0}, "*.0.*.v_proj": {"r": 2}, "down_proj": {"r": 3, "rslora": True}},
    ),
    "all-linear": ("llama", {"all-linear": {"r": 4, "alpha": 7}}),
    "embedding": ("llama", {"embedding": {"r": 4}, "q_proj": {"r": 2}}),
    "head": ("llama", {"lm_head": {"r": 5}}),
    "embedding and head": ("llama", {"embedding": {"r": 4}, "lm_head": {"r": 2, "rslora": True}}),
    "conv1d": ("gpt2", {"all-linear": {"r": 4, "alpha": 5}}),
    "conv1d, mixed": ("gpt2", {"c_attn": {"r": 3}, "c_fc": {"r": 6, "rslora": True}}),
    "everything": ("gpt2", {"all-linear": {"r": 4}, "embedding": {"r": 3}, "lm_head": {"r": 2}}),
}


@pytest.mark.parametrize(("kind", "rules"), SITES.values(), ids=SITES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_peft_computes_the_same_logits(kind, rules, dtype, tolerance, tmp_path, make_base, lora_on, logits_of):
    bare = make_base(kind, dtype)
    ours = lora_on(bare, rules)
    export_peft(ours, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    assert (logits_of(ours) - logits_of(theirs)).abs().max() <= tolerance
    assert (logits_of(ours) - logits_of(bare)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_untied_head_is_a_site_of_its_own(kind, tmp_path, make_base, lora_on, logits_of):
    bare = make_base(kind, untied=True)
    ours = lora_on(bare, {"lm_head": {"r": 2}, "embedding": {"r": 2}})
    export_peft(ours, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    assert (logits_of(ours) - logits_of(theirs)).abs().max() <= 1e-5


def test_ours_through_peft_and_back_is_bit_exact_where_the_scale_is_a_power_of_two(
    tmp_path, make_base, lora_on, logits_of
):
    bare = make_base("llama")
    ours = lora_on(bare, {"q_proj": {"r": 4, "alpha": 16}, "up_proj": {"r": 8, "alpha": 4}, "lm_head": {"r": 16}})
    back = import_peft(copy.deepcopy(bare), export_peft(ours, tmp_path))
    for (path, a), (_, b) in zip(adapted(ours), adapted(back), strict=True):
        assert torch.equal(a.adapter.A, b.adapter.A), path
        assert torch.equal(a.adapter.scale * a.adapter.B, b.adapter.B), path
        assert b.adapter.scale == 1.0
    assert (logits_of(ours) - logits_of(back)).abs().max() <= 1e-6
    again = export_peft(back, tmp_path / "again")
    assert (again / "adapter_model.safetensors").read_bytes() == (tmp_path / "adapter_model.safetensors").read_bytes()
    assert json.loads((again / "adapter_config.json").read_text()) == config(tmp_path)


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_nf4_base_writes_the_same_keys_and_sites_as_a_dense_one(kind, tmp_path, make_base, lora_on):
    rules = {"all-linear": {"r": 4}, "embedding": {"r": 2}}
    export_peft(lora_on(make_base(kind), rules), tmp_path / "dense")
    export_peft(lora_on(quantize(make_base(kind)), rules), tmp_path / "nf4")
    dense, nf4 = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("dense", "nf4"))
    assert dense.keys() == nf4.keys()
    assert all(torch.equal(dense[name], nf4[name]) for name in dense)
    assert config(tmp_path / "dense")["target_modules"] == config(tmp_path / "nf4")["target_modules"]
    PeftModel.from_pretrained(make_base(kind), tmp_path / "nf4")


class Twice(nn.Module):
    """Two sites, the path of one the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.inner = nn.Sequential()
        self.inner.proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.proj(self.proj(x))


def test_a_path_that_ends_another_reaches_its_own_site_only(tmp_path):
    torch.manual_seed(0)
    bare = Twice().requires_grad_(False)
    ours = apply(copy.deepcopy(bare), plan(bare, {"re:proj": LoRA}))
    nn.init.normal_(ours.proj.adapter.B)
    theirs = PeftModel.from_pretrained(copy.deepcopy(bare), export_peft(ours, tmp_path))
    x = torch.randn(3, 8)
    assert (ours(x) - theirs(x)).abs().max() <= 1e-5
    assert not any("inner.proj.lora" in name for name, _ in theirs.named_parameters())


def test_one_dropout_is_written_and_several_are_not(tmp_path, make_base, lora_on):
    bare = make_base("llama")
    export_peft(lora_on(bare, {"q_proj": {"dropout": 0.25}, "v_proj": {"dropout": 0.25, "r": 2}}), tmp_path / "one")
    export_peft(lora_on(bare, {"q_proj": {"dropout": 0.25}, "v_proj": {"dropout": 0.1}}), tmp_path / "two")
    assert config(tmp_path / "one")["lora_dropout"] == 0.25
    assert config(tmp_path / "two")["lora_dropout"] == 0.0


def test_the_base_is_called_what_the_caller_says_or_what_it_was_loaded_as(tmp_path, make_base, lora_on):
    ours = lora_on(make_base("llama"), {"q_proj": {}})
    assert config(export_peft(ours, tmp_path))["base_model_name_or_path"] is None
    ours.config._name_or_path = "some/base"
    assert config(export_peft(ours, tmp_path))["base_model_name_or_path"] == "some/base"
    assert config(export_peft(ours, tmp_path, "another/base"))["base_model_name_or_path"] == "another/base"


def test_other_files_of_the_folder_stay_and_nothing_else_is_left(tmp_path, make_base, lora_on):
    (tmp_path / "adapter.safetensors").write_bytes(b"ours")
    export_peft(lora_on(make_base("llama"), {"q_proj": {}}), tmp_path)
    export_peft(lora_on(make_base("llama"), {"v_proj": {}}), tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["adapter.safetensors", "adapter_config.json", "adapter_model.safetensors"]
    assert all("v_proj" in name for name in config(tmp_path)["target_modules"])


def test_a_write_that_fails_leaves_the_older_folder_as_it_was(tmp_path, make_base, lora_on, monkeypatch):
    ours = lora_on(make_base("llama"), {"q_proj": {}})
    export_peft(ours, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ours.config._name_or_path = "\ud800"  # cannot be encoded: the second of the two files fails
    with pytest.raises(UnicodeEncodeError):
        export_peft(ours, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Doubled(LoRA):
    """Not LoRA's equation any more."""

    def forward(self, base: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(base, x)


class Scale(Adapter):
    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.ones(()))

    def forward(self, base: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.s * base(x)


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"*": Full}, "carries Full"),
        ({"q_proj": LoRA, "*norm.weight": Full}, "norm.weight carries Full"),
        ({"q_proj": LoRA, "v_proj": Scale}, "v_proj carries Scale"),
        ({"q_proj": Doubled}, r"q_proj carries Doubled, which does not compute what its factors\(\) say"),
    ],
)
def test_what_peft_s_format_does_not_hold_is_refused_before_anything_is_written(rules, named, tmp_path, make_base):
    model = make_base("llama")
    apply(model, plan(model, rules))
    with pytest.raises(ConfigError, match=named):
        export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_adapters_is_refused(tmp_path, make_base):
    with pytest.raises(ConfigError, match="carries no adapter"):
        export_peft(make_base("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Scaled(nn.Embedding):
    embed_scale = torch.tensor(8.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


def test_an_embedding_that_scales_its_output_is_refused(tmp_path):
    model = nn.Sequential(Scaled(10, 4))
    apply(model, plan(model, {"embedding": LoRA}))
    with pytest.raises(ConfigError, match="Scaled scales its output"):
        export_peft(model, tmp_path / "out")
