"""Where adapters go: blocks and backbones, layer ranges, excludes, and several methods in one model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from lowrank.adapters import Adapter, Full, LoRA
from lowrank.adapters.inject import adapter_state, apply, current_plan, named_trainable, remove
from lowrank.adapters.plan import Rules, plan
from lowrank.adapters.sites import sites
from lowrank.errors import ConfigError
from lowrank.quant.convert import quantize


class Shift(Adapter):
    """A block's or a backbone's outputs, times 1 + g, g zero at the start."""

    sites = ("block", "backbone")

    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(1))

    def forward(self, base: nn.Module, *args: object, **kwargs: object) -> object:
        return base(*args, **kwargs)


def paths(model: nn.Module, rules: Rules, exclude: tuple[str, ...] = ()) -> list[str]:
    return [row.path for row in plan(model, rules, exclude).rows]


def refused(model: nn.Module, rules: Rules, exclude: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(model, rules, exclude)
    return str(caught.value)


def test_blocks_and_the_backbone_are_sites_of_the_models_width(llama: LlamaForCausalLM, gpt2: GPT2LMHeadModel) -> None:
    assert paths(llama, {"blocks": Shift, "backbone": Shift}) == ["model", "model.layers.0", "model.layers.1"]
    assert paths(gpt2, {"blocks": Shift, "backbone": Shift}) == ["transformer", "transformer.h.0", "transformer.h.1"]
    for model in (llama, gpt2):
        assert {row.shape for row in plan(model, {"blocks": Shift, "backbone": Shift}).rows} == {(32, 32)}


def test_blocks_stay_blocks_once_they_are_wrapped(model: nn.Module) -> None:
    rules: Rules = {"blocks": Shift, "backbone": Shift}
    made = plan(model, rules)
    apply(model, made)
    assert current_plan(model) == plan(model, rules) == made


def test_every_block_draws_its_own_masks(model: nn.Module) -> None:
    rows = plan(model, {"blocks": Shift}).rows
    assert len({row.group for row in rows}) == len(rows)


def test_a_list_of_layers_is_no_list_of_blocks() -> None:
    stack = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert paths(nn.Sequential(stack), {"all-linear": LoRA}) == ["0.0", "0.1"]
    text = refused(nn.Sequential(stack), {"all-linear@0": LoRA})
    assert text == "adapter.targets: 'all-linear@0': no layer 0 in Sequential; there is no list of blocks."


def test_learnt_positions_that_are_called_with_a_mask_are_no_embedding_to_adapt() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
    model = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)).eval()
    assert paths(model, {"embedding": LoRA}) == ["model.decoder.embed_tokens"]
    assert "OPTLearnedPositionalEmbedding" in refused(model, {"embed_positions": LoRA})


def test_blocks_are_the_decoders_not_those_of_what_stands_before_it(llama: LlamaForCausalLM) -> None:
    class Tower(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(depth))

    decoder = dict(llama.model.named_children())
    for name in decoder:
        delattr(llama.model, name)
    llama.model.vision, llama.model.empty = Tower(3), nn.ModuleList()
    for name, module in decoder.items():
        setattr(llama.model, name, module)
    assert paths(llama, {"blocks": Shift}) == ["model.layers.0", "model.layers.1"]
    assert paths(llama, {"q_proj@1": LoRA}) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [("q_proj@0", [0]), ("q_proj@0-1", [0, 1]), ("*.q_proj@1,0", [0, 1]), ("re:.*q_proj@1", [1]), ("q_proj@ 1 ", [1])],
)
def test_a_pattern_is_limited_to_layers(llama: LlamaForCausalLM, pattern: str, layers: list[int]) -> None:
    assert paths(llama, {pattern: LoRA}) == [f"model.layers.{n}.self_attn.q_proj" for n in layers]


def test_a_keyword_a_module_and_a_parameter_are_limited_alike(llama: LlamaForCausalLM, gpt2: GPT2LMHeadModel) -> None:
    inside = [path for path in paths(llama, {"all-linear": LoRA}) if path.startswith("model.layers.1.")]
    assert paths(llama, {"all-linear@1": LoRA}) == inside
    assert paths(llama, {"blocks@1": Shift}) == ["model.layers.1"]
    biases = [name for name, _ in gpt2.named_parameters() if name.endswith(".bias") and ".h.0." in name]
    assert paths(gpt2, {"*.bias@0": Full}) == biases
    assert paths(gpt2, {"bias@0": Full}) == biases
    mlp = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert paths(llama, {"mlp@1": Full}) == mlp


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("q_proj@1-0", "'q_proj@1-0': the range 1-0 is empty."),
        ("q_proj@0-2", "'q_proj@0-2': no layer 2 in LlamaForCausalLM; the layers are 0 to 1."),
        ("q_proj@", "'q_proj@': '' is not a layer or a range of them, such as 3 or 0-7."),
        ("q_proj@0,", "'q_proj@0,': '' is not a layer or a range of them, such as 3 or 0-7."),
        ("q_proj@-1", "'q_proj@-1': '-1' is not a layer or a range of them, such as 3 or 0-7."),
        ("q_proj@first", "'q_proj@first': 'first' is not a layer or a range of them, such as 3 or 0-7."),
        ("q_proj@0-99999999999", "'q_proj@0-99999999999': '0-99999999999' is not a layer or a range of them, such as"),
        ("lm_head@0", "'lm_head@0' matches no module. Nearest: 'lm_head' (1 module)."),
        ("backbone@0", "'backbone@0' matches no module."),
        ("q_porj@0-1,1,0-1", "'q_porj@0-1,1,0-1' matches no module. Nearest: 'q_proj' (2 modules)."),
    ],
)
def test_a_range_that_is_empty_or_not_there_is_named(llama: LlamaForCausalLM, pattern: str, said: str) -> None:
    assert refused(llama, {pattern: LoRA}).startswith(f"adapter.targets: {said}")
    in_exclude = refused(llama, {"all-linear": LoRA}, (pattern,))
    assert in_exclude.startswith("adapter.exclude: ")
    assert pattern in in_exclude


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (("q_proj",), 12),
        (("*.layers.0.*",), 7),
        (("all-linear@0",), 7),
        (("blocks@1",), 7),  # and what lies in it
        (("mlp",), 8),
        (("mlp@0", "self_attn@1"), 7),
        (("re:.*down_proj", "up_proj@0"), 11),
    ],
)
def test_what_is_excluded_is_left_out_with_all_that_lies_in_it(
    llama: LlamaForCausalLM, exclude: tuple[str, ...], left: int
) -> None:
    everything = paths(llama, {"all-linear": LoRA})
    kept = paths(llama, {"all-linear": LoRA}, exclude)
    assert len(kept) == left
    assert kept == [path for path in everything if path in kept]


def test_excluding_leaves_parameters_out_too(gpt2: GPT2LMHeadModel) -> None:
    names = [name for name, _ in gpt2.named_parameters()]
    assert paths(gpt2, {"*": Full}, ("*.bias",)) == [name for name in names if not name.endswith(".bias")]
    assert paths(gpt2, {"*": Full}, ("blocks",)) == [name for name in names if ".h." not in name]
    quantised = quantize(gpt2)  # and so the rest can train over NF4
    rest = [name for name in names if any(part in name for part in (".ln_", ".wte", ".wpe"))]
    assert paths(quantised, {"*": Full}, ("all-linear",)) == rest


def test_a_slip_in_a_parameter_s_or_its_module_s_name_has_its_nearest(llama: LlamaForCausalLM) -> None:
    assert refused(llama, {"*.weigt": Full}).endswith("Nearest: 'weight' (21 parameters).")
    assert refused(llama, {"q_porj": Full}).endswith("Nearest: 'q_proj' (2 modules).")


def test_a_tied_head_has_no_parameter_to_train(gpt2: GPT2LMHeadModel) -> None:
    text = refused(gpt2, {"lm_head": Full})
    assert text == "adapter.targets: 'lm_head' has no parameter of its own: it is tied to transformer.wte.weight."


def test_an_exclude_that_matches_nothing_names_the_nearest(llama: LlamaForCausalLM) -> None:
    text = refused(llama, {"all-linear": LoRA}, ("q_porj",))
    assert text == "adapter.exclude: 'q_porj' matches no module. Nearest: 'q_proj' (2 modules)."
    assert refused(llama, {"all-linear": LoRA}, ("mpl",)).endswith("Nearest: 'mlp' (2 modules).")


@pytest.mark.parametrize("exclude", [("q_proj",), ("self_attn",), ("all-linear",), ("*",), ("backbone",)])
def test_excluding_everything_that_a_rule_matches_is_an_error(
    llama: LlamaForCausalLM, exclude: tuple[str, ...]
) -> None:
    for pattern in ("q_proj", "*.q_*"):
        text = refused(llama, {pattern: LoRA, "lm_head": LoRA}, exclude)
        assert text == f"adapter.targets: everything that '{pattern}' matches is in adapter.exclude."


def test_an_exclude_without_effect_is_said(llama: LlamaForCausalLM) -> None:
    made = plan(llama, {"all-linear": LoRA}, ("lm_head", "q_proj", "norm"))
    assert made.notes == (
        "adapter.exclude: 'lm_head' leaves out nothing that a target matches",
        "adapter.exclude: 'norm' leaves out nothing that a target matches",
    )


def test_each_site_has_the_options_of_its_own_rule(llama: LlamaForCausalLM) -> None:
    rules: Rules = {"q_proj@0": partial(LoRA, r=2), "q_proj@1": partial(LoRA, r=5), "v_proj": partial(LoRA, r=3)}
    apply(llama, plan(llama, rules))
    attention = [layer.self_attn for layer in llama.model.layers]
    assert [(one.q_proj.adapter.r, one.v_proj.adapter.r) for one in attention] == [(2, 3), (5, 3)]


def test_a_bad_option_among_several_rules_names_its_own(llama: LlamaForCausalLM) -> None:
    text = refused(llama, {"q_proj": LoRA, "*.mlp.*": partial(LoRA, r=40, init="pissa")})
    assert text.startswith("adapter.targets['*.mlp.*'].r: 40 is not allowed with init=pissa; at most 32 ")
    alone = refused(llama, {"q_proj": partial(LoRA, r=0), "v_proj": partial(LoRA, r=0)})  # options of the group
    assert alone == "adapter.r: 0 is not allowed; a positive integer."


def mixed(model: nn.Module) -> Rules:
    norm = "*layernorm*" if isinstance(model, LlamaForCausalLM) else "*.ln_*"
    return {"blocks": Shift, "all-linear@0": partial(LoRA, r=2), norm: Full}


def test_several_methods_train_side_by_side_and_come_off_again(model: nn.Module, tokens: Tensor) -> None:
    before = dict(model.named_modules())
    made = plan(model, mixed(model))
    assert {row.method for row in made.rows} == {"Shift", "LoRA", "Full"}
    apply(model, made)
    assert current_plan(model) == made
    trainable = named_trainable(model)
    assert sum(p.numel() for p in trainable.values()) == made.trainable_parameters
    assert {p.requires_grad for p in trainable.values()} == {True}
    assert sum(p.requires_grad for p in model.parameters()) == len(trainable)
    model(input_ids=tokens, labels=tokens).loss.backward()
    moved = {name.rpartition(".")[2] for name, p in trainable.items() if p.grad is not None and p.grad.any()}
    assert moved >= {"B", "weight"}
    remove(model)
    assert dict(model.named_modules()) == before


def test_a_trained_base_under_an_adapter_keeps_both_in_one_state(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    site = "model.layers.0.self_attn.q_proj"
    made = plan(llama, {"q_proj@0": LoRA, f"{site}.weight": Full})
    apply(llama, made)
    assert set(adapter_state(llama)) == {f"{site}.weight", f"{site}.adapter.A", f"{site}.adapter.B"}
    llama(input_ids=tokens, labels=tokens).loss.backward()
    q = llama.model.layers[0].self_attn.q_proj
    assert q.base.weight.grad.any()
    assert q.adapter.B.grad.any()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_weight_that_trains_cannot_be_replaced_by_a_start(llama: LlamaForCausalLM, init: str) -> None:
    before = [p.clone() for p in llama.parameters()]
    made = plan(llama, {"q_proj": partial(LoRA, r=2, init=init), "*": Full})
    with pytest.raises(ConfigError, match=r"q_proj\.weight trains itself, but LoRA .* replaces it"):
        apply(llama, made)
    assert all(torch.equal(old, new) for old, new in zip(before, llama.parameters(), strict=True))
    assert not any("adapter" in path for path, _ in sites(llama))


def test_what_trained_before_is_not_in_the_next_plan(llama: LlamaForCausalLM) -> None:
    apply(llama, plan(llama, {"*norm*": Full}))
    remove(llama)
    apply(llama, plan(llama, {"*norm*": Full}))
    made = plan(llama, {"q_proj": LoRA})
    apply(llama, made)  # nothing was wrapped, so nothing has to come off first
    assert current_plan(llama) == made
