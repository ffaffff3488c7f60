"""What many tests share: tiny random models, the conformance kit's own; a few rows of data; a module's own cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli import write_rows
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lowrank.testing.bases import VOCABULARY, build_gpt2, build_llama


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


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs keep from one to the next is kept from test to test of a module, and not beyond."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")
