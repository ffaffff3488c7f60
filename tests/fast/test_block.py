"""Fused blocks: the plain blocks' numbers and gradients, and no byte kept beyond the least."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.adapters import IA3
from lowrank.adapters.inject import apply
from lowrank.adapters.plan import plan
from lowrank.data.pack import pack, pad
from lowrank.fast import block, linear
from lowrank.quant.convert import quantize
from tests.documents import texts
from tests.fast.passes import BLOCKS, LENGTHS, adapted, agree, still, trained


@pytest.mark.parametrize("p", [0.0, 0.2], ids=["", "dropout"])
@pytest.mark.parametrize("collate", [pack, pad])
@pytest.mark.parametrize("name", ["llama64", "gpt2_64"])
def test_loss_and_gradients_are_the_plain_ones_in_fp64(
    name: str, collate: Any, p: float, request: pytest.FixtureRequest
) -> None:
    model, batch = still(adapted(request.getfixturevalue(name), p)), collate(texts(LENGTHS))
    loss, wanted, _ = trained(model, batch)
    assert block.fuse(model) == f"{BLOCKS}/{BLOCKS} blocks"
    fused, found, _ = trained(model, batch)
    assert float(fused) == pytest.approx(float(loss), rel=1e-6)  # the plain norm has its statistics in fp32
    agree(found, wanted, 2e-6)


@pytest.mark.parametrize("case", ["nf4", "bf16", "checkpointing", "q alone", "onednn"])
def test_loss_and_gradients_are_the_plain_ones(case: str, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, context, tolerance = "all-linear", None, 2e-5
    match case:
        case "nf4":
            llama = quantize(llama)
        case "bf16":
            context, tolerance = torch.autocast("cpu", dtype=torch.bfloat16), 0.06
        case "checkpointing":
            getattr(llama, "activation_checkpointing_enable", llama.gradient_checkpointing_enable)(
                {"use_reentrant": False}
            )
        case "q alone":
            targets = "q_proj"
        case "onednn":
            monkeypatch.setattr(linear, "cannot", lambda: None)
    model, batch = adapted(llama, 0.1, targets), pack(texts(LENGTHS))
    loss, wanted, _ = trained(model, batch, context)
    block.fuse(model)
    fused, found, _ = trained(model, batch, context)
    assert float(fused) == pytest.approx(float(loss), rel=tolerance)
    agree(found, wanted, tolerance)


def test_what_is_kept_is_the_least_to_the_byte(llama: Any) -> None:
    config = llama.config
    model, tokens, targets = adapted(llama), sum(LENGTHS), len(pack(texts(LENGTHS)).targets)
    block.fuse(model)
    _, _, kept = trained(model, pack(texts(LENGTHS)))
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv = config.num_key_value_heads * config.head_dim
    blocks = BLOCKS * tokens * 4 * (4 * d + 2 * kv + 2 * f + heads + 2)  # x q k v o x′ gate up, lse, two statistics
    head = 4 * targets * (config.vocab_size + d + 4)
    angles, last = 2 * tokens * config.head_dim * 4, tokens * (d + 1) * 4
    beside = kept - blocks
    assert 0 < beside <= angles * 2 + last * 3 + head * 3  # none of it by block
    more = 3
    one, both = kept, trained(model, pack(texts(LENGTHS * more)))[2]
    per_token = (both - one) / ((more - 1) * tokens)
    assert per_token >= BLOCKS * 4 * (4 * d + 2 * kv + 2 * f)


def test_names_and_states_stay_and_unfusing_gives_the_plain_block_back(llama: Any) -> None:
    model, batch = adapted(llama), pack(texts(LENGTHS))
    names, wanted = list(model.state_dict()), trained(model, batch)[1]
    block.fuse(model)
    assert list(model.state_dict()) == names
    block.unfuse(model)
    assert not any("forward" in vars(module) for module in model.modules())
    agree(trained(model, batch)[1], wanted, 0.0)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("ia3", "v_proj: IA3 is not plain LoRA"),
        ("hook", "self_attn.k_proj has hooks"),
        ("trains", "gate_proj: its weights train"),
        ("norm", "input_layernorm: it trains"),
    ],
)
def test_a_block_that_is_more_stays_plain_and_is_named(case: str, reason: str, llama: Any) -> None:
    first = llama.model.layers[0]
    llama.requires_grad_(False)
    match case:
        case "ia3":
            apply(llama, plan(llama, {"v_proj@0": IA3}))
        case "hook":
            first.self_attn.k_proj.register_forward_hook(lambda *_: None)
        case "trains":
            first.mlp.gate_proj.weight.requires_grad_(True)
        case "norm":
            first.input_layernorm.weight.requires_grad_(True)
    assert block.fuse(llama) == f"{BLOCKS - 1}/{BLOCKS} blocks (1 plain: {reason})"
    assert "forward" not in vars(first)


def test_the_models_own_dropout_keeps_a_block_plain(gpt2: Any) -> None:
    for module in gpt2.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    assert block.fuse(gpt2.requires_grad_(False)).startswith(f"0/{BLOCKS} blocks")


def test_generation_and_evaluation_are_the_plain_blocks_own(llama: Any, tokens: Tensor) -> None:
    model = adapted(llama).eval()
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
        text = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
        block.fuse(model)
        assert torch.equal(model(input_ids=tokens).logits, wanted)
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0), text)
