"""What PEFT writes, we read, and compute the same; whatever we would compute otherwise is refused by name."""

from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
import torch
from both_ways import CONFIG, QUIET, TENSORS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lowrank.adapters import LoRA
from lowrank.adapters.inject import apply, current_plan
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import adapted
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.errors import ConfigError, RefusedError
from lowrank.export.peft import import_peft
from lowrank.keys import key
from lowrank.quant.convert import quantize

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Unsupported layer type")]


def written_by_peft(bare, folder, **options):
    """PEFT's model over a copy of ``bare``, every LoRA value drawn, saved to ``folder``."""
    theirs = get_peft_model(copy.deepcopy(bare), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=key(0, name), dtype=torch.float64)
                parameter.copy_(0.2 * values)
    theirs.save_pretrained(folder)
    return theirs.eval()


SAVED = {
    "suffixes": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(up|down)_proj", "r": 3, "lora_alpha": 5}),
    "all-linear": ("llama", {"target_modules": "all-linear", "r": 4}),
    "excluded": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "rslora": ("llama", {"target_modules": ["q_proj", "o_proj"], "r": 5, "lora_alpha": 7, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"v_proj": 2, r"^model\.layers\.1\.mlp\.up_proj": 7, r"layers\.\d+\.mlp\.up_proj": 3},
            "alpha_pattern": {"v_proj": 1, r"layers\.0\.mlp\..*": 11},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "r": 4, "use_rslora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True}),
    "conv1d and embeddings": ("gpt2", {"target_modules": ["wte", "wpe", "c_fc", "lm_head"], "r": 3, "lora_alpha": 2}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}),
}


@pytest.mark.parametrize(("kind", "options"), SAVED.values(), ids=SAVED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_we_compute_the_logits_of_what_peft_saved(kind, options, dtype, tolerance, tmp_path, make_base, logits_of):
    bare = make_base(kind, dtype)
    theirs = written_by_peft(bare, tmp_path, **options)
    ours = import_peft(copy.deepcopy(bare), tmp_path)
    assert (logits_of(ours) - logits_of(theirs)).abs().max() <= tolerance
    assert (logits_of(ours) - logits_of(bare)).abs().max() > 1e-2
    wrapped = {name.removesuffix(".base_layer") for name, _ in theirs.base_model.model.named_modules()}
    assert {path for path, _ in adapted(ours)} <= wrapped


def test_an_untied_head_that_peft_saved_beside_its_adapter_is_known_for_the_base_s_own(tmp_path, make_base, logits_of):
    bare = make_base("llama", untied=True)
    theirs = written_by_peft(bare, tmp_path, target_modules=["lm_head", "embed_tokens"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / TENSORS)
    ours = import_peft(copy.deepcopy(bare), tmp_path)
    assert (logits_of(ours) - logits_of(theirs)).abs().max() <= 1e-5


def test_the_model_itself_is_changed_and_ready_to_train(tmp_path, make_base):
    bare = make_base("llama")
    written_by_peft(bare, tmp_path, target_modules=["q_proj"], lora_dropout=0.25, r=4, lora_alpha=6)
    ours = import_peft(bare, tmp_path, name="default")
    assert ours is bare
    (row, *_) = current_plan(ours).rows
    assert row.options == {"r": 4, "alpha": 6, "dropout": 0.25, "rslora": False}
    assert row.group
    trainable = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".adapter." in name for name in trainable)


def test_half_precision_tensors_become_fp32_masters(tmp_path, make_base):
    bare = make_base("llama", torch.bfloat16)
    written_by_peft(bare, tmp_path, target_modules=["q_proj"])
    stored = {name: t.bfloat16() for name, t in load_file(tmp_path / TENSORS).items()}
    save_file(stored, tmp_path / TENSORS)
    ours = import_peft(bare, tmp_path)
    for path, module in adapted(ours):
        assert module.adapter.A.dtype == torch.float32
        assert torch.equal(module.adapter.A, stored[f"base_model.model.{path}.lora_A.weight"].float())


def test_it_fits_an_nf4_base(tmp_path, make_base, logits_of):
    bare = make_base("gpt2")
    written_by_peft(bare, tmp_path, target_modules=["c_attn", "wte"])
    base = quantize(copy.deepcopy(bare))
    before = logits_of(base)
    assert (logits_of(import_peft(base, tmp_path)) - before).abs().max() > 1e-2


def test_an_imported_adapter_saves_and_loads_in_our_own_format(tmp_path, make_base, logits_of):
    bare = make_base("llama")
    options = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "use_rslora": True}
    written_by_peft(bare, tmp_path / "peft", **options)
    ours = import_peft(copy.deepcopy(bare), tmp_path / "peft")
    back = load_adapter(copy.deepcopy(bare), save_adapter(ours, tmp_path / "own"))
    assert torch.equal(logits_of(ours), logits_of(back))


@pytest.fixture
def saved(tmp_path, make_base):
    """(a bare base, a folder that PEFT wrote for it)"""
    bare = make_base("llama")
    written_by_peft(bare, tmp_path / "peft", target_modules=["q_proj", "v_proj"], r=4)
    return bare, tmp_path / "peft"


def refused(error, text, model, folder, **options):
    """The error, its text, and a model that is as it was."""
    before = {name: (id(m), type(m)) for name, m in model.named_modules()}
    with pytest.raises(error, match=re.escape(text)):
        import_peft(model, folder, **options)
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def edit_tensors(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("peft_type", "BOFT"),
        ("peft_type", None),
        ("use_qalora", True),
        ("target_parameters", ["experts.w1"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [1]),
        ("ensure_weight_tying", True),
        ("megatron_config", {"a": 1}),
        ("loftq_config", {"loftq_bits": 4}),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "loftq"),
        ("a_field_of_a_later_peft", {"on": True}),
        ("r", 0),
        ("r", True),
        ("r", "8"),
        ("lora_alpha", 0),
        ("lora_alpha", -2),
        ("lora_dropout", 1.0),
        ("use_rslora", "yes"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 2}),
        ("rank_pattern", {"(?i)q_proj": 2}),
        ("alpha_pattern", ["q_proj"]),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [1]),
        ("target_modules", "*.q_proj"),
    ],
)
def test_a_field_that_is_not_plain_lora_is_refused_by_its_name(field, value, saved):
    bare, folder = saved
    edit_config(folder, **{field: value})
    refused(RefusedError, f"{folder / CONFIG}: {field}: ", bare, folder)


def test_two_alphas_for_one_site_are_refused_because_peft_s_file_does_not_keep_their_order(saved):
    bare, folder = saved
    edit_config(folder, alpha_pattern={"q_proj": 4, r"layers\.0\..*": 2})
    refused(RefusedError, r"'q_proj' and 'layers\\.0\\..*' differ on model.layers.0.self_attn.q_proj", bare, folder)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"lora_alpha": NaN}'])
def test_a_damaged_configuration_is_refused(damage, saved):
    bare, folder = saved
    (folder / CONFIG).write_bytes(damage)
    refused(RefusedError, str(folder / CONFIG), bare, folder)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_refused_by_its_name(name, saved):
    bare, folder = saved
    (folder / name).unlink()
    refused(RefusedError, f"{folder}: no {name} there", bare, folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path, make_base):
    refused(RefusedError, "nowhere: no adapter_config.json there", make_base("llama"), tmp_path / "nowhere")


def test_a_pickle_is_never_read(saved):
    bare, folder = saved
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    refused(RefusedError, "adapter_model.bin: a pickle can run any code", bare, folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_torn_tensor_file_is_refused(keep, saved):
    bare, folder = saved
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:keep])
    refused(RefusedError, f"{folder / TENSORS}: cannot be read", bare, folder)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), "q_proj.lora_B.weight is missing"),
        (lambda t: [t.pop(f"{Q0}.lora_{x}.weight") for x in "AB"], "no tensors for model.layers.0.self_attn.q_proj"),
        (lambda t: t.clear(), "holds no LoRA"),
        (lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(3)}), "lora_magnitude_vector is not part of"),
        (lambda t: t.update({f"{Q0}.lora_B.bias": torch.ones(3)}), "lora_B.bias is not part of a LoRA"),
        (lambda t: t.update({"q_proj.lora_A.weight": torch.ones(3, 3)}), "q_proj.lora_A.weight is not part of"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(3, 64)}), "are no factors of one matrix"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(64)}), "q_proj.lora_A.weight has shape (64,)"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 64).int()}), "lora_A.weight holds torch.int32"),
        (
            lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(2, 64), f"{Q0}.lora_B.weight": torch.ones(64, 2)}),
            "says rank 4 for model.layers.0.self_attn.q_proj, but its tensors have rank 2",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(260, 64)}),
            "holds its own model.embed_tokens.weight, which is not this base's",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(300, 64)}),
            "holds its own model.embed_tokens.weight, which is not this base's",
        ),
    ],
)
def test_tensors_that_are_not_the_lora_they_should_be_are_refused(change, text, saved):
    bare, folder = saved
    edit_tensors(folder, change)
    refused(RefusedError, text, bare, folder)


def test_an_adapter_of_another_architecture_is_refused_with_the_nearest_name(saved, make_base):
    _, folder = saved
    other = make_base("gpt2")
    refused(ConfigError, "model.layers.0.self_attn.q_proj and 3 more: no such linear layer", other, folder)
    edit_tensors(folder, lambda t: [t.update({k.replace("self_attn", "attn"): t.pop(k)}) for k in list(t)])
    bare, _ = saved
    refused(ConfigError, "Nearest: 'model.layers.0.self_attn.q_proj'", bare, folder)


def test_an_adapter_for_another_width_is_refused_with_both_shapes(saved):
    bare, folder = saved
    edit_tensors(folder, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32)}))
    refused(ConfigError, "q_proj is made for a weight (64, 32) (out, in); this model's is (64, 64)", bare, folder)


def test_a_model_that_carries_adapters_already_is_refused(saved):
    bare, folder = saved
    apply(bare, plan(bare, {"up_proj": LoRA}))
    refused(ConfigError, "already carries adapters", bare, folder)


def test_fields_left_out_have_peft_s_own_defaults(saved, logits_of):
    bare, folder = saved
    fields = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    copied = folder.with_name("short")
    shutil.copytree(folder, copied)
    (copied / CONFIG).write_text(json.dumps(fields))
    full, short = (import_peft(copy.deepcopy(bare), path) for path in (folder, copied))
    assert torch.equal(logits_of(full), logits_of(short))
