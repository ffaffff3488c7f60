"""A model of six blocks in a folder, and the parts and data of a run on it."""

from __future__ import annotations

from pathlib import Path

from cli import SMALL, write_rows

from lowrank import assemble, compose
from lowrank.assemble import Data, Parts
from lowrank.models.tiny import byte_tokenizer
from lowrank.testing.bases import build_gpt2, build_llama

LAYERS = 6


def folder(path: Path, kind: str = "llama") -> Path:
    """A model with weights and a tokenizer, as transformers saves them."""
    if not path.exists():
        sizes = {"vocab_size": 260, "pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 257}
        model = (
            build_llama(**sizes, num_hidden_layers=LAYERS, max_position_embeddings=512)
            if kind == "llama"
            else build_gpt2(**sizes, n_layer=LAYERS, n_positions=512)
        )
        model.save_pretrained(path)
        byte_tokenizer(adds_bos=kind == "llama").save_pretrained(path)
    return path


def parts_of(tmp: Path, *overrides: str, kind: str = "llama") -> Parts:
    rows = write_rows(tmp / "rows.jsonl")
    own = ("model=hf", f"model.name={folder(tmp / kind, kind)}", f"data.path={rows}")
    return assemble.parts(compose.compose([*SMALL, *own, *overrides]))


def parts_and_data(tmp: Path, *overrides: str, kind: str = "llama") -> tuple[Parts, Data]:
    parts = parts_of(tmp, *overrides, kind=kind)
    return parts, assemble.data(parts.config, parts.tokenizer)
