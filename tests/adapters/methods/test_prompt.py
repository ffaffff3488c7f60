"""Prompt tuning: rows that start as a text's embeddings are that text, and PEFT's with the same numbers."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_models import PLAIN, K, alone, apart, cache_keyword, carrying, left_padded, site
from cli import SMALL, write_rows
from documents import texts
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MambaConfig, MistralConfig, OPTConfig, PretrainedConfig

import lowrank
from lowrank.adapters import LoRA, Prompt
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import plan
from lowrank.data.pack import pack, pad
from lowrank.errors import ConfigError
from lowrank.models import attention
from lowrank.testing.bases import Base
from lowrank.train.loss import target_loss

DOCUMENTS = texts([9, 2, 13])
TOKENS = [document.tokens for document in DOCUMENTS]
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
WINDOWED = {
    "mistral": MistralConfig(**LLAMA_LIKE),
    "gemma3, which scales embeddings": Gemma3TextConfig(**LLAMA_LIKE, query_pre_attn_scalar=8),
}


def on(model: Any, seed: int = 0, **options: Any) -> Any:
    return apply(model, plan(model, {"backbone": partial(Prompt, **options)}), seed)


def build(config: PretrainedConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("base", ["llama", "gpt2", "nf4"])
def test_a_prompt_that_starts_as_a_text_is_that_text(base: str) -> None:
    """Repeated to fill k; before every packed document, with the positions that it has before one alone."""
    model, front = Base(base, base, "backbone").exact(), [5, 17, 3, 5, 17]
    wanted = [logits[len(front) :] for logits in alone(model, [[*front, *text] for text in TOKENS])]
    on(model, length=5, init="text", init_text=[5, 17, 3]).double()
    with torch.no_grad():
        packed = model(**pack(DOCUMENTS).inputs, use_cache=False).logits[0]
    assert apart(packed, torch.cat(wanted)) <= 1e-6  # its parameters start in fp32


@pytest.mark.parametrize("name", WINDOWED)
def test_it_is_that_text_behind_left_padding_and_within_a_sliding_window_too(name: str) -> None:
    """Padding between the prompt and the text would push it out of a window of 6, or away from what sees it."""
    model, front = build(WINDOWED[name]), [5, 17, 3]
    assert attention.install(model) is None
    wanted = alone(model, [[*front, *text] for text in TOKENS])
    on(model, length=3, init="text", init_text=front)
    settings = {**PLAIN, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        rows = model(**left_padded(TOKENS), use_cache=False).logits
        packed = model(**pack(DOCUMENTS).inputs, use_cache=False).logits[0]
    for row, logits in enumerate(wanted):
        assert apart(rows[row, 3 - len(logits) :], logits[3:]) <= 1e-5
    assert apart(packed, torch.cat([logits[3:] for logits in wanted])) <= 1e-5
    cached = model.generate(**left_padded(TOKENS), **settings)
    without = model.generate(**left_padded(TOKENS), **settings, use_cache=False)
    assert torch.equal(cached.sequences, without.sequences)
    assert apart(torch.stack(cached.logits), torch.stack(without.logits)) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # of what peft asks transformers for
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_logits_loss_and_gradients_are_pefts(base: str) -> None:
    bare = Base(base, base, "backbone").exact()
    bare.set_attn_implementation("sdpa")
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K, prompt_tuning_init="RANDOM")
    theirs = get_peft_model(copy.deepcopy(bare), settings).double()
    ours = carrying("prompt", base)
    value = theirs.prompt_encoder["default"].embedding.weight
    site(ours).adapter.embedding.data.copy_(value.data)
    batch = pad(DOCUMENTS)
    wanted = theirs(**batch.inputs).logits[:, K:]  # (documents, tokens, vocabulary)
    for row, logits in enumerate(alone(ours, TOKENS)):
        assert apart(logits, wanted[row, : len(logits)].detach()) <= 1e-5
    loss = nn.functional.cross_entropy(wanted.flatten(0, 1)[batch.positions], batch.targets, reduction="sum")
    mine = target_loss(ours, pack(DOCUMENTS))
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    mine.backward()
    assert apart(site(ours).adapter.embedding.grad, value.grad) <= 1e-5


def rows_of(model: Any) -> torch.Tensor:
    return site(model).adapter.embedding.detach()


def test_it_starts_from_the_vocabulary_or_with_its_spread(make_llama: Any) -> None:
    model = on(make_llama(), length=40)
    table = model.get_input_embeddings().weight
    drawn = (rows_of(model)[:, None] == table).all(-1)  # (k, vocabulary)
    assert drawn.any(1).all()
    assert len(set(drawn.int().argmax(1).tolist())) > 15
    assert not torch.equal(rows_of(on(make_llama(), seed=1, length=40)), rows_of(model))
    random = rows_of(on(make_llama(), length=100, init="random"))
    assert random.std().item() == pytest.approx(table.detach().std().item(), rel=0.05)
    assert abs(random.mean().item()) < 0.02


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"init": "txt"}, "adapter.init: 'txt' is not allowed; one of"),
        ({"init": "text"}, "adapter.init_text: None is not allowed with init=text; a text, from Python as its"),
        ({"init": "text", "init_text": 5}, "adapter.init_text: 5 is not allowed with init=text; a text"),
        ({"init_text": [3]}, "adapter.init_text: a text is not allowed with init=vocabulary; null, or init=text."),
        ({"init": "text", "init_text": []}, r"adapter.init_text: \[\] is not allowed with init=text"),
        ({"init": "text", "init_text": "hello"}, "adapter.init_text: 'hello' is not allowed with init=text"),
        ({"init": "text", "init_text": [3, 64]}, "adapter.init_text: token 64 is not allowed; the model has 64."),
    ],
)
def test_a_start_that_cannot_be_is_refused_while_planning(options: dict[str, Any], sentence: str, llama: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        plan(llama, {"backbone": partial(Prompt, **options)})


def test_a_model_without_a_cache_of_tokens_is_refused_while_planning() -> None:
    model = build(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ConfigError, match="MambaModel has no cache of keys and values, which Prompt needs"):
        plan(model, {"backbone": Prompt})


def test_a_prepared_mask_is_refused() -> None:
    model = carrying("prompt", "llama").float()
    prompt = left_padded(TOKENS)
    with pytest.raises(ConfigError, match=r"a prepared 4D mask, such as a static cache brings, has no columns"):
        model.generate(**prompt, **PLAIN, cache_implementation="static")


def test_a_cache_that_does_not_fit_the_text_is_refused() -> None:
    """transformers counts the prompt's entries as tokens where it goes on from a returned cache."""
    model = carrying("prompt", "llama").float()
    name, text = cache_keyword(model), torch.tensor([[*TOKENS[2], *TOKENS[0]]])
    first = text[:, :13]
    kept = model.generate(first, attention_mask=torch.ones_like(first), **PLAIN, return_dict_in_generate=True)[name]
    with pytest.raises(ConfigError, match="Start from an empty cache and the whole text"):
        model.generate(text, attention_mask=torch.ones_like(text), **PLAIN, **{name: kept})
    with torch.no_grad():  # a loop of one's own, that counts tokens alone
        cache = model(input_ids=first, use_cache=True)[name]
        rest = model(input_ids=text[:, 13:], use_cache=True, **{name: cache}).logits[0]
    assert apart(rest, alone(model, text.tolist())[0][13:]) <= 1e-5


def test_the_embeddings_may_carry_an_adapter_of_their_own(llama: Any) -> None:
    wanted = rows_of(on(copy.deepcopy(llama), length=K))
    apply(llama, plan(llama, {"backbone": partial(Prompt, length=K), "embedding": LoRA}))
    assert torch.equal(rows_of(llama), wanted)
    target_loss(llama, pad(DOCUMENTS)).backward()
    assert all(p.grad is not None for p in named_trainable(llama).values())


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize(
    "more", [("quant=nf4", "loop.gradient_checkpointing=true"), ("adapter.init=text", "adapter.init_text='Say it:'")]
)
def test_a_run_trains_it(model: str, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    data = f"data.path={write_rows(tmp_path / 'rows.jsonl')}"
    settings = (f"model={model}", "adapter=prompt", "loop.steps=12", "optim.lr=0.03", "adapter.length=4", *more)
    run = lowrank.train([*SMALL, data, *settings], tmp_path / "run")
    losses = [run.summary["eval"][when]["loss"] for when in ("before", "after")]
    assert losses[1] < losses[0]
    assert run.summary["packed"]
    assert len(run.samples) == 2
    opened = lowrank.open(run.folder)
    assert torch.equal(rows_of(opened.model), rows_of(run.model))
    if "quant=nf4" not in more:
        assert opened.plan.rows[0].options["init_text"] == list(b"Say it:")  # the byte tokenizer's


def test_texts_that_leave_no_room_are_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    data = f"data.path={write_rows(tmp_path / 'rows.jsonl')}"
    small = [*SMALL, data, "model=tiny_gpt2", "adapter=prompt", "loop.steps=2"]
    with pytest.raises(ConfigError, match=r"data.max_length: a text of \d+ tokens exceeds the 24 of the model's"):
        lowrank.train([*small, "adapter.length=1000"], tmp_path / "run")
    with pytest.raises(ConfigError, match=r"eval.generate.max_new_tokens: 900 after a prompt of \d+ tokens"):
        lowrank.train(
            [*small, "adapter.length=100", "eval.before=false", "eval.generate.max_new_tokens=900"], tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_embeddings_narrower_than_the_model_get_rows_as_narrow() -> None:
    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    config.word_embed_proj_dim, config.init_std = 16, 0.2
    model = build(config)
    assert attention.install(model) is None
    planned = plan(model, {"backbone": partial(Prompt, length=K)})
    assert [row.path for row in planned.rows] == ["model.decoder"]  # what OPT's head calls
    assert planned.trainable_parameters == K * 16
    apply(model, planned)
    with torch.no_grad():
        packed = model(**pack(DOCUMENTS).inputs, use_cache=False).logits[0]
    assert apart(packed, torch.cat(alone(model, TOKENS))) <= 1e-5
