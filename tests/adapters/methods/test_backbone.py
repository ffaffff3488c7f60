"""What a prefix and a prompt promise alike: every way to call the model gives what each text gives alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backbone_models import METHODS, NEW, PLAIN, K, alone, apart, cache_keyword, carrying, left_padded, site
from documents import texts
from torch import Tensor

from lowrank.adapters import LoRA
from lowrank.adapters.inject import apply, named_trainable, remove
from lowrank.adapters.plan import plan
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.data.pack import pack, pad
from lowrank.errors import ConfigError
from lowrank.eval.generate import generate
from lowrank.models import attention
from lowrank.models.tiny import byte_tokenizer, tiny_gpt2, tiny_llama
from lowrank.testing.bases import Base
from lowrank.train.loss import target_loss

DOCUMENTS = texts([9, 2, 13])
TOKENS = [document.tokens for document in DOCUMENTS]
BYTES = byte_tokenizer(adds_bos=False)
PROMPTS = [list(text.encode()) for text in ("def f(x):", "a", "the quick brown fox", "0123456789")]


@pytest.fixture(params=["llama", "gpt2", "nf4"])
def base(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(method: str, base: str) -> Any:
    return carrying(method, base)


def test_packed_documents_are_what_each_is_alone(model: Any) -> None:
    with torch.no_grad():
        packed = model(**pack(DOCUMENTS).inputs, use_cache=False).logits[0]  # (tokens, vocabulary)
    assert len(packed) == sum(map(len, TOKENS))
    assert apart(packed, torch.cat(alone(model, TOKENS))) <= 1e-10


def test_padded_rows_are_what_each_is_alone(model: Any) -> None:
    left = left_padded(TOKENS)
    with torch.no_grad():
        right = model(**pad(DOCUMENTS).inputs, use_cache=False).logits
        left_logits = model(**left, use_cache=False).logits
    for row, wanted in enumerate(alone(model, TOKENS)):
        assert apart(right[row, : len(wanted)], wanted) <= 1e-10
        assert apart(left_logits[row, -len(wanted) :], wanted) <= 1e-10


def test_a_plain_call_that_fills_a_cache_is_one_that_does_not(model: Any) -> None:
    with torch.no_grad():
        cached = model(input_ids=torch.tensor([TOKENS[0]]), use_cache=True)
    assert apart(cached.logits[0], alone(model, TOKENS[:1])[0]) <= 1e-10
    assert model(input_ids=torch.tensor([TOKENS[0]]), use_cache=False).get(cache_keyword(model)) is None


def test_another_first_document_leaves_the_second_bit_for_bit(model: Any) -> None:
    other = texts([9], seed=7)
    with torch.no_grad():
        one = model(**pack([DOCUMENTS[0], DOCUMENTS[2]]).inputs, use_cache=False).logits[0, 9:]
        two = model(**pack([other[0], DOCUMENTS[2]]).inputs, use_cache=False).logits[0, 9:]
    assert torch.equal(one, two)


def test_no_gradient_leaks_from_a_document_to_another(model: Any) -> None:
    inputs = dict(pack(DOCUMENTS).inputs)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    model(**inputs, inputs_embeds=embeddings, use_cache=False).logits[0, 11:].sum().backward()  # of the third
    assert embeddings.grad is not None
    assert not embeddings.grad[0, :11].any()
    assert embeddings.grad[0, 11:].abs().amin(-1).any()


def test_generation_with_a_cache_is_generation_without(model: Any) -> None:
    """Greedy, from prompts padded on the left: the same tokens and logits (which come in fp32), and those of each
    prompt alone."""
    settings = {**PLAIN, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**left_padded(TOKENS), **settings)
    without = model.generate(**left_padded(TOKENS), **settings, use_cache=False)
    assert torch.equal(cached.sequences, without.sequences)
    assert apart(torch.stack(cached.logits), torch.stack(without.logits)) <= 1e-6
    for row, text in enumerate(TOKENS):
        new = cached.sequences[row, -NEW:].tolist()
        step_by_step = alone(model, [[*text, *new]])[0][len(text) - 1 : -1]  # (new tokens, vocabulary)
        assert step_by_step.argmax(-1).tolist() == new
        assert apart(torch.stack(cached.logits)[:, row], step_by_step) <= 1e-6


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_our_generation_in_batches_is_that_of_one_prompt_at_a_time(method: str, build: Callable[[], Any]) -> None:
    model = build().double()
    assert attention.install(model) is None
    apply(model, plan(model, {"backbone": METHODS[method]})).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and (".layers." in name or ".h." in name):
                parameter.mul_(4)  # so that greedy text is not one token over and over
    one_by_one = generate(model, BYTES, PROMPTS, batch=1, max_new_tokens=8)
    assert generate(model, BYTES, PROMPTS, batch=4, max_new_tokens=8) == one_by_one
    assert len({text for (text,) in one_by_one}) == len(PROMPTS)


def gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    trained = named_trainable(model)
    loss = target_loss(model, pack(DOCUMENTS))
    return loss, dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(model: Any) -> None:
    wanted_loss, wanted = gradients(model.train())
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    loss, found = gradients(model)
    assert torch.equal(loss, wanted_loss)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_gradients_are_finite_differences(model: Any) -> None:
    _, found = gradients(model)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in named_trainable(model).items():
        way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(step * way)
                losses.append(target_loss(model, pack(DOCUMENTS)))
                parameter.sub_(step * way)
        slope = float(losses[0] - losses[1]) / 2e-5
        assert float((found[name] * way).sum()) == pytest.approx(slope, rel=1e-6), name


@pytest.mark.parametrize("collate", [pack, pad])
def test_the_target_loss_is_the_cross_entropy_of_each_text_alone(model: Any, collate: Callable[..., Any]) -> None:
    """The head runs on the target rows alone: their places must still be the text's."""
    wanted = sum(
        F.cross_entropy(logits[i - 1], torch.tensor(document.tokens[i]))
        for document, logits in zip(DOCUMENTS, alone(model, TOKENS), strict=True)
        for i in range(1, len(document.tokens))
        if document.target[i]
    )
    assert target_loss(model, collate(DOCUMENTS)).item() == pytest.approx(float(wanted), rel=1e-12)


def test_a_saved_one_comes_back_bit_for_bit(model: Any, method: str, base: str, tmp_path: Path) -> None:
    save_adapter(model.float(), tmp_path)
    other = load_adapter(Base(base, base, "backbone").fresh(), tmp_path)
    mine, theirs = named_trainable(model), named_trainable(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_copy_is_its_own(model: Any) -> None:
    twin, before = copy.deepcopy(model), alone(model, TOKENS)
    with torch.no_grad():
        for parameter in named_trainable(twin).values():
            parameter.add_(1)
    assert all(torch.equal(one, other) for one, other in zip(before, alone(model, TOKENS), strict=True))
    assert not torch.equal(alone(twin, TOKENS)[0], before[0])


def test_removing_leaves_the_bare_model(model: Any, base: str) -> None:
    bare = Base(base, base, "backbone").exact()
    trunk = site(model).base
    remove(model)
    assert trunk in list(model.modules())
    assert not [name for name, _ in model.named_modules() if "adapter" in name]
    assert torch.equal(alone(model, TOKENS)[0], alone(bare, TOKENS)[0])


def test_hidden_states_are_the_texts_alone(model: Any) -> None:
    with torch.no_grad():
        found = model(**pack(DOCUMENTS).inputs, use_cache=False, output_hidden_states=True).hidden_states
    for document, layers in zip(TOKENS, split(found), strict=True):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([document]), output_hidden_states=True).hidden_states
        assert all(apart(one, other[0]) <= 1e-10 for one, other in zip(layers, wanted, strict=True))


def split(layers: tuple[Tensor, ...]) -> Iterator[list[Tensor]]:
    """Each document's rows of every layer's (1, tokens, hidden)."""
    return (list(parts) for parts in zip(*(layer[0].split([9, 2, 13]) for layer in layers), strict=True))


@pytest.mark.parametrize("collate", [pack, pad])
def test_a_text_that_the_positions_do_not_suffice_for_is_refused(method: str, collate: Callable[..., Any]) -> None:
    model = carrying(method, "llama")
    fits, too_long = texts([128 - K]), texts([129 - K])
    target_loss(model, collate(fits))
    with pytest.raises(ConfigError, match=r"3 before a text of 126 tokens exceeds the model's 128 positions"):
        target_loss(model, collate(too_long))
    prompt = [1] * (128 - K - 4)
    assert len(generate(model, BYTES, [prompt], max_new_tokens=4)) == 1
    with pytest.raises(ConfigError, match=r"5 after a prompt of 121 tokens exceeds the model's 125 positions"):
        generate(model, BYTES, [prompt], max_new_tokens=5)


@pytest.mark.parametrize("length", [0, -1, 1.5, True, 128])
def test_a_length_out_of_range_is_refused_while_planning(method: str, length: Any) -> None:
    model = Base("llama", "llama", "backbone").fresh()
    with pytest.raises(ConfigError, match=rf"^adapter.length: {str(length).lower()} is not allowed; "):
        plan(model, {"backbone": partial(METHODS[method], length=length)})


def test_it_stands_beside_other_methods_in_one_model(method: str, base: str) -> None:
    model = Base(base, base, "backbone").exact()
    pattern = "wte" if base == "gpt2" else "embed_tokens"
    apply(model, plan(model, {"backbone": METHODS[method], "all-linear": LoRA, pattern: LoRA})).double()
    with torch.no_grad():
        for name, parameter in named_trainable(model).items():
            if name.endswith(".B"):
                parameter.add_(0.1)
        packed = model(**pack(DOCUMENTS).inputs, use_cache=False).logits[0]
    assert apart(packed, torch.cat(alone(model, TOKENS))) <= 1e-10
    _, found = gradients(model)
    assert all(gradient.any() for gradient in found.values())


def test_half_precision_follows_the_model_and_keeps_fp32_parameters(method: str) -> None:
    model = Base("llama", "llama", "backbone").fresh().to(torch.bfloat16)
    apply(model, plan(model, {"backbone": METHODS[method]}))
    assert {p.dtype for p in named_trainable(model).values()} == {torch.float32}
    exact = copy.deepcopy(model).float()
    with torch.no_grad():
        found = model(**pack(DOCUMENTS).inputs, use_cache=False).logits
        wanted = exact(**pack(DOCUMENTS).inputs, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            autocast = exact(**pack(DOCUMENTS).inputs, use_cache=False).logits
    assert found.dtype == torch.bfloat16
    assert apart(found.float(), wanted) <= 0.15
    assert apart(autocast.float(), wanted) <= 0.15


def test_another_attention_sees_the_same_rows(method: str, base: str) -> None:
    """transformers' own: a prefix then goes through the cache."""
    model = carrying(method, base)
    wanted, batch = alone(model, TOKENS), pad(DOCUMENTS)
    _, expected = gradients(model)
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            rows = model(**batch.inputs, use_cache=False).logits
        for row, logits in enumerate(wanted):
            assert apart(rows[row, : len(logits)], logits) <= 1e-6  # eager softmaxes in fp32
        target_loss(model, batch).backward()
        for parameter, gradient in zip(named_trainable(model).values(), expected.values(), strict=True):
            assert apart(parameter.grad, gradient) <= 1e-5
            parameter.grad = None
    model.set_attn_implementation("sdpa")
    settings = {**PLAIN, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**left_padded(TOKENS), **settings)
    without = model.generate(**left_padded(TOKENS), **settings, use_cache=False)
    assert torch.equal(cached.sequences, without.sequences)
    assert apart(torch.stack(cached.logits), torch.stack(without.logits)) <= 1e-6
