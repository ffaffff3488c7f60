"""Every architecture that has a row in the table of blocks, against its own plain blocks; the others are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lowrank.data.pack import pack, pad
from lowrank.fast import block
from lowrank.keys import key
from tests.documents import texts
from tests.fast.passes import BLOCKS, LENGTHS, adapted, check_fused_equals_plain, still

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
PHI3 = {"original_max_position_embeddings": 64, "sliding_window": 4}
KNOWN: dict[str, PretrainedConfig] = {
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, window 4": MistralConfig(**SIZES, sliding_window=4),
    "mistral, window beyond every text": MistralConfig(**SIZES, sliding_window=40),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, window 5": Qwen2Config(**SIZES, sliding_window=5, use_sliding_window=True, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES),
    "phi3": Phi3Config(**SIZES, **PHI3),
    "phi3, half of a head turned": Phi3Config(
        **SIZES,
        **PHI3,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "gemma": GemmaConfig(**SIZES, hidden_activation="gelu_pytorch_tanh"),
    "gpt2": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=BLOCKS, n_head=4, n_positions=64, initializer_range=0.2, bos_token_id=0
    ),
}
UNKNOWN: dict[str, tuple[PretrainedConfig, str]] = {
    "neox": (GPTNeoXConfig(**SIZES), "GPTNeoXLayer is not known"),
    "gemma2": (Gemma2Config(**SIZES), "Gemma2DecoderLayer is not known"),
    "opt": (
        OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=BLOCKS, num_attention_heads=4),
        "OPTDecoderLayer is not known",
    ),
    "llama with another activation": (LlamaConfig(**SIZES, hidden_act="relu"), "its activation is ReLU"),
    "attention to what comes later": (
        GemmaConfig(**SIZES, use_bidirectional_attention=True),
        "its attention is not causal",
    ),
}


def build(config: PretrainedConfig) -> Any:
    """Random, its biases and norms moved from 0 and 1, at which a lost one would not show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=key(0, "vector", name)))
    return model


@pytest.mark.parametrize("collate", [pack, pad])
@pytest.mark.parametrize("name", KNOWN)
def test_loss_and_gradients_are_the_plain_ones_in_fp64(name: str, collate: Any) -> None:
    model = still(adapted(build(KNOWN[name]).double(), 0.1))
    check_fused_equals_plain(model, collate(texts(LENGTHS)), 5e-6)  # the plain norm has its statistics in fp32


@pytest.mark.parametrize("name", KNOWN)
def test_loss_and_gradients_are_the_plain_ones_under_bf16_autocast(name: str) -> None:
    model = still(adapted(build(KNOWN[name]), 0.1))
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    check_fused_equals_plain(model, pack(texts(LENGTHS)), 0.08, context=context)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_row_is_named(name: str) -> None:
    config, reason = UNKNOWN[name]
    model = build(config).requires_grad_(False)
    assert block.fuse(model) == f"0/{BLOCKS} blocks ({BLOCKS} plain: {reason})"
    assert not any("forward" in vars(module) for module in model.modules())
