"""A batch, or a pack, that mixes adapters: every row, or document, is what it is alone with its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from banks import NAMES, RULES, alone, furthest, logits, together, tokens_of, trained
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lowrank
from lowrank.adapters import Bottleneck, LoRA
from lowrank.adapters.base import LINEAR
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import sites
from lowrank.errors import ConfigError
from lowrank.eval.generate import generate
from lowrank.keys import Clock, key
from lowrank.models.attention import install, no_mask
from lowrank.models.tiny import byte_tokenizer, tiny_llama
from lowrank.quant.convert import quantize

Make = Callable[..., Any]
IDS = tokens_of(6, 9)


@pytest.fixture(params=["make_llama", "make_gpt2"])
def make(request: pytest.FixtureRequest) -> Make:
    """Either architecture."""
    return request.getfixturevalue(request.param)


def nf4(make: Make) -> Make:
    return lambda: quantize(make(), "nf4")


def double(make: Make) -> Make:
    return lambda: make().double()


# Batches


@pytest.mark.parametrize(("form", "bound"), [(lambda make: make, 1e-6), (double, 1e-14), (nf4, 1e-6)])
def test_a_row_is_what_it_is_alone(form: Callable[[Make], Make], bound: float, make: Make, tmp_path: Path) -> None:
    model = together(form(make), tmp_path)
    with lowrank.use(model, NAMES):
        mixed = logits(model, IDS)
    for row, name in enumerate(NAMES):
        assert furthest(mixed[row], logits(alone(form(make), name), IDS[row : row + 1])[0]) <= bound, name


@pytest.mark.parametrize("names", [["a", "a", None], ["b", "c", "c"], [None, None, None], ["d", "d", "d"]])
def test_rows_that_stand_together_go_together(names: list[str | None], make: Make, tmp_path: Path) -> None:
    model = together(make, tmp_path)
    with lowrank.use(model, names):
        mixed = logits(model, IDS[:3])
    for row, name in enumerate(names):
        assert furthest(mixed[row], logits(alone(make, name), IDS[row : row + 1])[0]) <= 1e-6


def test_the_base_runs_once_for_all_rows_and_again_only_for_what_asks_it_something_else(
    make_llama: Make, tmp_path: Path
) -> None:
    model, calls = together(make_llama, tmp_path), Counter[str]()
    for path, module in sites(model):
        if type(module) in LINEAR:

            def counted(x: Tensor, path: str = path, forward: Any = module.forward) -> Tensor:
                calls[path] += 1
                return forward(x)

            vars(module)["forward"] = counted
    for names, times in ((["a", None, "b", "a"], 1), (["a", "c", "b", "a"], 2)):  # an OFT turns the inputs first
        calls.clear()
        with lowrank.use(model, names):
            logits(model, IDS[:4])
        assert {calls[path] for path in calls if path != "lm_head"} == {times}


def test_dropout_of_an_adapters_rows_is_what_it_is_without_the_others(llama: LlamaForCausalLM) -> None:
    clock = Clock(3)
    for name in ("a", "b"):
        apply(llama, plan(llama, {"q_proj": partial(LoRA, dropout=0.5)}), clock=clock, name=name)
        for tensor, parameter in named_trainable(llama).items():
            parameter.data.normal_(0, 0.2, generator=key(0, name, tensor))
    llama.train()
    clock.set(1, 0)
    with lowrank.use(llama, ["a", "b", "a"]):
        mixed = logits(llama, IDS[:3])
    with lowrank.use(llama, "a"):
        apart = logits(llama, IDS[[0, 2]])
        clock.set(2, 0)
        assert furthest(logits(llama, IDS[[0, 2]]), apart) > 1e-3
    assert furthest(mixed[[0, 2]], apart) <= 1e-6


def test_gradient_checkpointing_changes_no_gradient(make_llama: Make, tmp_path: Path) -> None:
    model = together(double(make_llama), tmp_path, "ab").train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        with lowrank.use(model, ["a", None, "b"]):
            model(input_ids=IDS[:3], use_cache=False).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in named_trainable(model).items() if p.grad is not None}

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


# Packs

LENGTHS = (4, 1, 7, 3, 5, 2)


def packed() -> dict[str, Any]:
    return {
        "ids": tokens_of(1, sum(LENGTHS)),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0),
        "attention_mask": no_mask(torch.device("cpu")),
        "use_cache": False,
    }


def test_a_document_of_a_pack_is_what_it_is_alone(make: Make, tmp_path: Path) -> None:
    model, ids = together(make, tmp_path), packed()["ids"]
    install(model)
    with lowrank.use(model, NAMES):
        mixed = logits(model, **packed())[0]
    start = 0
    for length, name in zip(LENGTHS, NAMES, strict=True):
        document = slice(start, start + length)
        assert furthest(mixed[document], logits(alone(make, name), ids[:, document])[0]) <= 1e-6, name
        start += length


@pytest.mark.parametrize("kept", [torch.tensor([0, 3, 4, 5, 12, 21]), torch.tensor([6, 7]), 8])
def test_an_adapter_of_the_head_follows_the_positions_that_are_kept(
    kept: Tensor | int, make: Make, tmp_path: Path
) -> None:
    model = together(make, tmp_path)
    install(model)
    with lowrank.use(model, NAMES):
        whole = logits(model, **packed())[0]
        some = logits(model, **packed(), logits_to_keep=kept)[0]
    assert furthest(some, whole[kept if isinstance(kept, Tensor) else slice(-kept, None)]) <= 1e-6


# Generation


def test_each_prompt_is_continued_by_its_own_adapter(make: Make, tmp_path: Path) -> None:
    model, mask = together(double(make), tmp_path), torch.ones(6, 9, dtype=torch.long)
    mask[1, :4] = mask[4, :2] = 0  # padding on the left
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    with lowrank.use(model, NAMES):
        mixed = model.generate(IDS, attention_mask=mask, **settings)
    for row, name in enumerate(NAMES):
        one = slice(row, row + 1)
        own = alone(double(make), name).generate(IDS[one], attention_mask=mask[one], **settings)
        assert torch.equal(mixed[one], own), name


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "num_return_sequences": 2, "seed": 5}])
def test_batched_generation_keeps_each_prompts_adapter_through_sorting_and_splitting(
    sampled: dict[str, Any], tmp_path: Path
) -> None:
    prompts = [list(text.encode()) for text in ("a", "the quick brown fox", "xy", "def f(x):", "return", "0123456789")]
    model, tokenizer = together(double(tiny_llama), tmp_path), byte_tokenizer(adds_bos=False)
    with lowrank.use(model, NAMES):
        mixed = generate(model, tokenizer, prompts, batch=4, max_new_tokens=6, **sampled)
        again = generate(model, tokenizer, prompts, batch=64, max_new_tokens=6, **sampled)
    assert mixed == again
    for row, name in enumerate(NAMES):
        own = generate(alone(double(tiny_llama), name), tokenizer, prompts, max_new_tokens=6, **sampled)
        assert mixed[row] == own[row], name
    assert len({text for texts in mixed for text in texts}) > 1


# Bad input


@pytest.mark.parametrize("names", [["a", None], ["a"] * 7])
def test_a_list_of_another_length_than_the_batch_is_refused(names: list[str | None], llama: LlamaForCausalLM) -> None:
    apply(llama, plan(llama, {"q_proj": LoRA}), name="a")
    with lowrank.use(llama, names), pytest.raises(ConfigError, match=rf"{len(names)} names for a batch of 6 rows"):
        logits(llama, IDS)
    install(llama)
    with lowrank.use(llama, names), pytest.raises(ConfigError, match=rf"{len(names)} names for a batch of 6 documents"):
        logits(llama, **packed())
    with lowrank.use(llama, names), pytest.raises(ConfigError, match=rf"{len(names)} names for 3 prompts"):
        generate(llama, byte_tokenizer(adds_bos=False), [[1], [2], [3]], max_new_tokens=2)


def test_beams_are_refused(llama: LlamaForCausalLM) -> None:
    apply(llama, plan(llama, {"q_proj": LoRA}), name="a")
    with lowrank.use(llama, ["a", None]), pytest.raises(ConfigError, match="2 names for a batch of 4 rows"):
        llama.generate(IDS[:2], num_beams=2, max_new_tokens=2)


def test_an_empty_list_is_refused(llama: LlamaForCausalLM) -> None:
    apply(llama, plan(llama, {"q_proj": LoRA}), name="a")
    with pytest.raises(ConfigError, match="the list is empty"):
        lowrank.use(llama, [])


def test_a_layer_that_cannot_tell_rows_apart_is_named(llama: LlamaForCausalLM) -> None:
    """As the experts of a mixture are called, with whichever tokens were sent to them."""
    apply(llama, plan(llama, {"q_proj": LoRA}), name="a")
    layer: nn.Module = llama.model.layers[1].self_attn.q_proj
    with lowrank.use(llama, ["a", None]):
        logits(llama, IDS[:2])
        with pytest.raises(ConfigError, match=r"layers\.1\.self_attn is given \(2, 32\).*cannot be told apart"):
            layer(torch.zeros(2, 32))


def test_a_block_cannot_send_rows_different_ways(make_llama: Make) -> None:
    model = trained(make_llama(), {"blocks": Bottleneck})
    apply(model, plan(model, RULES["a"]), name="a")
    before = logits(model, IDS)
    with pytest.raises(ConfigError, match=r"'default' adapts model\.layers\.0, a whole block or the backbone"):
        lowrank.use(model, ["a", "default"])
    assert torch.equal(logits(model, IDS), before)
