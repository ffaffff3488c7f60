"""Changes of what a run is made from, other than its configuration. Each gets the folder of a copy of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], Any]


def nothing(made_from: Path) -> None:
    """Not at all."""


def a_character_of_the_data(made_from: Path) -> None:
    replaced(made_from / "data.jsonl", "Say 7.", "Say 7!")


def two_rows_swapped(made_from: Path) -> None:
    path = made_from / "data.jsonl"
    first, second, *rest = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([second, first, *rest]), encoding="utf-8")


def a_bit_of_the_base(made_from: Path) -> None:
    path = made_from / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # of the last value's mantissa
    path.write_bytes(content)


def two_tokens_swapped(made_from: Path) -> None:
    path = made_from / "base" / "tokenizer.json"
    tokenizer = json.loads(path.read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def the_users_own_code(made_from: Path) -> None:
    replaced(made_from / "own" / "own_method.py", "1.0", "1.1")


def two_threads(made_from: Path) -> None:
    import torch

    torch.set_num_threads(torch.get_num_threads() + 1)


def another_version(made_from: Path) -> None:
    """Installed beside the real one, and found first."""
    folder = made_from / "packages" / "transformers-0.0.1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    sys.path.insert(0, str(folder.parent))


NAMES: dict[Change, str] = {
    nothing: "nothing",
    a_character_of_the_data: "a character of the data",
    two_rows_swapped: "two rows of the data swapped",
    a_bit_of_the_base: "a bit of the base's weights",
    two_tokens_swapped: "two tokens swapped",
    the_users_own_code: "the user's own code",
    two_threads: "one more thread",
    another_version: "another version of transformers",
}


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
