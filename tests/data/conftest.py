"""Tokenizers in the shapes that models come with, and a file of a hundred rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_bpe import CHATML, bpe
from transformers import PreTrainedTokenizerFast
from written import Settings, jsonl, row


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Adds nothing, has no chat template (GPT-2's shape)."""
    return bpe(bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Adds a beginning token itself (Llama's shape)."""
    return bpe(bos=True)


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a ChatML template, pad == eos (SmolLM2's shape)."""
    return bpe(bos=False, chat_template=CHATML)


@pytest.fixture(scope="session", params=["plain", "bos", "chat"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture
def hundred(tmp_path: Path) -> Settings:
    return jsonl(tmp_path / "train.jsonl", [row(n) for n in range(1, 101)])
