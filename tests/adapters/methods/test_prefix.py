"""Prefix tuning: a prefix is a text's keys and values, and PEFT's with the same numbers; refused where it cannot be."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_models import PLAIN, K, alone, apart, cache_keyword, carrying, left_padded, site
from cli import SMALL, write_rows
from documents import texts
from peft import PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPTNeoXConfig,
    JambaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    PretrainedConfig,
    RwkvConfig,
)

import lowrank
from lowrank.adapters import Prefix
from lowrank.adapters.inject import apply
from lowrank.adapters.plan import plan
from lowrank.data.pack import pack, pad
from lowrank.errors import ConfigError
from lowrank.models import attention
from lowrank.testing.bases import Base
from lowrank.train.loss import target_loss

DOCUMENTS = texts([9, 2, 13])
TOKENS = [document.tokens for document in DOCUMENTS]
SMALL_MODEL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {**SMALL_MODEL, "num_attention_heads": 4, "intermediate_size": 48}


def on(model: Any, **options: Any) -> Any:
    return apply(model, plan(model, {"backbone": partial(Prefix, **options)}))


@pytest.mark.parametrize("base", ["llama", "gpt2", "nf4"])
def test_a_prefix_of_a_texts_keys_and_values_is_that_text(base: str) -> None:
    """Their layout, the key/value heads, and the tokens' positions: k on."""
    model, front = Base(base, base, "backbone").exact(), [5, 17, 3, 60]
    wanted = [logits[len(front) :] for logits in alone(model, [[*front, *text] for text in TOKENS])]
    with torch.no_grad():
        layers = model(input_ids=torch.tensor([front]), use_cache=True)[cache_keyword(model)].layers
    on(model, length=len(front)).double()
    kept = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
    site(model).adapter.embedding.data = kept.permute(3, 0, 1, 2, 4).flatten(1)  # (k, layers·2·heads·width)
    with torch.no_grad():
        packed = model(**pack(DOCUMENTS).inputs, use_cache=False).logits[0]
    assert apart(packed, torch.cat(wanted)) <= 1e-10


@pytest.mark.parametrize("base", ["llama", "gpt2", "nf4"])
def test_a_prefix_that_starts_from_a_text_is_that_text(base: str) -> None:
    """Whatever mode the model is in when the prefix is made, and with no word to torch's generator."""
    model, front = Base(base, base, "backbone").exact(), [5, 17, 3, 5, 17]
    wanted = [logits[len(front) :] for logits in alone(model, [[*front, *text] for text in TOKENS])]
    before = torch.get_rng_state()
    on(model.train(), length=5, init="text", init_text=[5, 17, 3])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert apart(torch.cat(alone(model.double().eval(), TOKENS)), torch.cat(wanted)) <= 1e-6  # it starts in fp32


def test_it_starts_from_words_of_the_vocabulary_or_at_random(llama: Any, make_llama: Any) -> None:
    """No key or value of a layer is far from those that the model makes itself."""
    text = torch.randint(0, 64, (1, 100), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        layers = llama(input_ids=text, use_cache=True)[cache_keyword(llama)].layers
    own = torch.stack([torch.stack([layer.keys, layer.values]) for layer in layers]).std((2, 3, 4, 5))  # (layers, 2)
    kept = site(on(llama, length=40)).adapter.keys_and_values().detach()  # (layers, 2, kv heads, k, head width)
    assert torch.allclose(kept.std((2, 3, 4)), own, rtol=0.2)
    other = site(apply(make_llama(), plan(make_llama(), {"backbone": partial(Prefix, length=40)}), 1)).adapter
    assert not torch.allclose(other.keys_and_values(), kept, rtol=0.1)
    random = site(on(make_llama(), length=40, init="random")).adapter.embedding.detach()
    assert random.std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # of what peft asks transformers for
@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("hidden", [None, 5])
def test_logits_loss_and_gradients_are_pefts(base: str, hidden: int | None) -> None:
    bare = Base(base, base, "backbone").exact()
    bare.set_attn_implementation("sdpa")
    settings = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=K, prefix_projection=hidden is not None, encoder_hidden_size=hidden
    )
    theirs = get_peft_model(copy.deepcopy(bare), settings).double()
    ours = carrying("prefix" if hidden is None else "prefix by a network", base)
    encoder, adapter = theirs.prompt_encoder["default"], site(ours).adapter
    pairs = {"embedding": encoder.embedding.weight}
    if hidden is not None:
        first, _, second = encoder.transform
        pairs |= {"weight1": first.weight, "bias1": first.bias, "weight2": second.weight, "bias2": second.bias}
    with torch.no_grad():
        for name, value in pairs.items():
            getattr(adapter, name).copy_(value)
    batch = pad(DOCUMENTS)
    wanted = theirs(**batch.inputs).logits  # (documents, tokens, vocabulary)
    for row, logits in enumerate(alone(ours, TOKENS)):
        assert apart(logits, wanted[row, : len(logits)].detach()) <= 1e-5
    loss = nn.functional.cross_entropy(wanted.flatten(0, 1)[batch.positions], batch.targets, reduction="sum")
    mine = target_loss(ours, pack(DOCUMENTS))
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    mine.backward()
    for name, value in pairs.items():
        assert apart(getattr(adapter, name).grad, value.grad) <= 1e-5, name


def test_the_plan_counts_what_trains(llama: Any, gpt2: Any) -> None:
    counts = [plan(llama, {"backbone": partial(Prefix, length=3, hidden=hidden)}) for hidden in (None, 5)]
    assert counts[0].trainable_parameters == 3 * 2 * 2 * 16  # k · layers · 2 · (2 kv heads of 8)
    assert counts[1].trainable_parameters == 3 * 16 + (16 * 5 + 5) + (5 * 64 + 64)
    assert plan(gpt2, {"backbone": partial(Prefix, length=3)}).trainable_parameters == 3 * 2 * 2 * 32
    assert [row.path for row in counts[0].rows] == ["model"]


def test_a_sliding_window_never_hides_the_prefix() -> None:
    """Mistral with a window of 4: packed, alone, and generated far beyond the window."""
    config = MistralConfig(**HEADS, num_key_value_heads=2, sliding_window=4, initializer_range=0.2)
    model: Any = build(config)
    assert attention.install(model) is None
    on(model, length=K)
    with torch.no_grad():
        packed = model(**pack(DOCUMENTS).inputs, use_cache=False).logits[0]
    assert apart(packed, torch.cat(alone(model, TOKENS))) <= 1e-5
    cached = model.generate(**left_padded(TOKENS), **{**PLAIN, "max_new_tokens": 12})
    assert torch.equal(
        cached, model.generate(**left_padded(TOKENS), **{**PLAIN, "max_new_tokens": 12}, use_cache=False)
    )
    last = alone(model, TOKENS)[2][-1]
    with torch.no_grad():
        site(model).adapter.embedding.mul_(0.5)
    assert apart(alone(model, TOKENS)[2][-1], last) > 1e-3  # the 13th token still sees it


def test_a_static_cache_and_a_cache_of_ones_own_are_continued() -> None:
    """The cache holds tokens alone, so whatever transformers does with one stays right."""
    model = carrying("prefix", "llama").float()
    prompt = torch.tensor([TOKENS[2]])
    wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), **PLAIN)
    static = model.generate(prompt, attention_mask=torch.ones_like(prompt), **PLAIN, cache_implementation="static")
    assert torch.equal(static, wanted)
    with torch.no_grad():
        name = cache_keyword(model)
        cache = model(input_ids=prompt[:, :8], use_cache=True)[name]
        rest = model(input_ids=prompt[:, 8:], use_cache=True, **{name: cache}).logits[0]
    assert apart(rest, alone(model, TOKENS)[2][8:]) <= 1e-5


def build(config: PretrainedConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "mamba": (MambaConfig(**SMALL_MODEL, state_size=4), "has no cache of keys and values"),
    "rwkv": (RwkvConfig(**SMALL_MODEL, context_length=64), "has no cache of keys and values"),
    "jamba": (
        JambaConfig(**HEADS, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
        "has layers without plain keys and values (DynamicLayer, LinearAttentionLayer)",
    ),
    "deepseek": (
        DeepseekV3Config(**HEADS, n_routed_experts=4, n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16),
        "compresses its keys and values",
    ),
    "mpt": (MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4), "counts positions itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_a_prefix_has_no_place_in_is_refused_while_planning(name: str) -> None:
    config, why = REFUSED[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=re.escape(why)) as refused:
        plan(model, {"backbone": Prefix})
    assert "\n" not in str(refused.value)


def test_without_lowranks_attention_what_needs_it_is_refused(llama: Any) -> None:
    on(llama, length=K)
    before = alone(llama, TOKENS)
    with pytest.raises(ConfigError, match="before every packed document only with lowrank's attention"):
        llama(**pack(DOCUMENTS).inputs, use_cache=False)
    enable = getattr(llama, "activation_checkpointing_enable", None) or llama.gradient_checkpointing_enable
    enable()
    with pytest.raises(ConfigError, match="under gradient checkpointing only with lowrank's attention"):
        target_loss(llama.train(), pad(DOCUMENTS))
    assert attention.install(llama.eval()) is None
    assert apart(alone(llama, TOKENS)[2], before[2]) <= 1e-5


def test_a_sliding_window_without_lowranks_attention_is_refused() -> None:
    model = on(build(MistralConfig(**HEADS, num_key_value_heads=2, sliding_window=4)), length=K)
    with pytest.raises(ConfigError, match="in sight of a sliding window only with lowrank's attention"):
        model(input_ids=torch.tensor([TOKENS[0]]))


def test_a_prefix_that_the_attention_ignores_is_noticed() -> None:
    model = carrying("prefix", "llama")
    attention.AttentionInterface.register(attention.NAME, attention.sdpa_attention_forward)
    try:
        with pytest.raises(ConfigError, match="0 of 2 layers of LlamaModel took the prefix"):
            model(input_ids=torch.tensor([TOKENS[0]]))
    finally:
        assert attention.install(model) is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"init": "words"}, "adapter.init: 'words' is not allowed; one of"),
        ({"init": "text"}, "adapter.init_text: None is not allowed with init=text; a text, from Python as its"),
        ({"init": "text", "init_text": 5}, "adapter.init_text: 5 is not allowed with init=text; a text"),
        ({"init_text": [3]}, "adapter.init_text: a text is not allowed with init=vocabulary; null, or init=text."),
        ({"init": "text", "init_text": [3], "hidden": 4}, "adapter.init: text is not allowed with hidden=4;"),
    ],
)
def test_a_start_that_cannot_be_is_refused_while_planning(options: dict[str, Any], sentence: str, llama: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        plan(llama, {"backbone": partial(Prefix, **options)})


def test_keys_that_are_not_what_the_configuration_says_are_refused() -> None:
    """GPT-NeoX has as many key/value heads as others, whatever its configuration holds besides."""
    model = build(GPTNeoXConfig(**HEADS, num_key_value_heads=2))
    planned = plan(model, {"backbone": Prefix})
    with pytest.raises(ConfigError, match=r"one shape; GPTNeoXModel has \[\(4, 8, 4, 8\), \(4, 8, 4, 8\)\]"):
        apply(model, planned)
    assert not [name for name, _ in model.named_modules() if "adapter" in name]


@pytest.mark.parametrize("hidden", [0, -3, 2.5, True])
def test_a_network_without_a_width_is_refused(hidden: Any, llama: Any) -> None:
    told = str(hidden).lower()  # as YAML writes it
    with pytest.raises(ConfigError, match=rf"^adapter.hidden: {told} is not allowed; a positive integer\.$"):
        plan(llama, {"backbone": partial(Prefix, hidden=hidden)})


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("more", [("quant=nf4", "loop.gradient_checkpointing=true"), ("adapter.hidden=8",)])
def test_a_run_trains_it(model: str, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    data = f"data.path={write_rows(tmp_path / 'rows.jsonl')}"
    settings = (f"model={model}", "adapter=prefix", "loop.steps=12", "optim.lr=0.03", "adapter.length=4", *more)
    run = lowrank.train([*SMALL, data, *settings], tmp_path / "run")
    losses = [run.summary["eval"][when]["loss"] for when in ("before", "after")]
    assert losses[1] < losses[0]
    assert run.summary["packed"]
    assert len(run.samples) == 2
    mine, theirs = (site(found.model).adapter.state_dict() for found in (run, lowrank.open(run.folder)))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
