"""Tiny random models built from their configs: small enough for finite differences, wide enough for NF4's blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY, WIDTH, LAYERS, HEADS = 64, 32, 2, 4
SPREAD = 0.2  # transformers' 0.02 makes attention nearly uniform, so that a leak or a wrong scale would not show


def build_llama(**changes: object) -> LlamaForCausalLM:
    """2 layers of 32, 4 query heads over 2 key/value heads, MLP of 48, untied head: fp32, evaluation mode."""
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": SPREAD,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def build_gpt2(**changes: object) -> GPT2LMHeadModel:
    """2 layers of 32, 4 heads, Conv1D, tied head, dropout 0.1 as GPT-2 has: fp32, evaluation mode."""
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": 128,
        "initializer_range": SPREAD,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes})).eval()


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    return build_llama


@pytest.fixture
def make_gpt2() -> Callable[..., GPT2LMHeadModel]:
    return build_gpt2


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return build_llama()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    return build_gpt2()


@pytest.fixture
def llama64() -> LlamaForCausalLM:
    return build_llama().double()


@pytest.fixture
def gpt2_64() -> GPT2LMHeadModel:
    return build_gpt2().double()


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Either architecture in fp32."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    """(2, 11) token ids."""
    return torch.randint(0, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
