"""Llama-like models of random weights, by shape, and texts of exact lengths for them.

Speed and memory depend on shapes, not on what the weights are. Each is made once and kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """``d`` hidden, ``kv`` key/value width, ``f`` feed-forward width."""

    d: int
    kv: int
    f: int
    layers: int
    heads: int
    vocabulary: int
    tied: bool = True
    dtype: str = "float32"

    @property
    def layer(self) -> int:
        """Matrix parameters of one."""
        return 2 * self.d**2 + 2 * self.d * self.kv + 3 * self.d * self.f

    @property
    def rank_widths(self) -> int:
        """Σ (in + out) over the linear layers of one layer."""
        return 2 * (self.d + self.d) + 2 * (self.d + self.kv) + 3 * (self.d + self.f)

    @property
    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.d,
            intermediate_size=self.f,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv * self.heads // self.d,
            max_position_embeddings=65536,
            tie_word_embeddings=self.tied,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
        )


SMOLLM2 = Shape(576, 192, 1536, 30, 9, 49152)
SHAPES = {
    "smollm2-cut": Shape(576, 192, 1536, 6, 9, 49152),  # SmolLM2-135M's, 6 of 30 layers
    "1b": Shape(2048, 512, 8192, 16, 32, 128256, dtype="bfloat16"),  # Llama-3.2-1B
    "7b": Shape(4096, 4096, 11008, 32, 32, 32000, tied=False, dtype="bfloat16"),  # Llama-2-7B
    "8b": Shape(4096, 1024, 14336, 32, 32, 128256, tied=False, dtype="bfloat16"),  # Llama-3.1-8B
    "tiny": Shape(64, 32, 128, 4, 4, 512),  # of the scripts' own tests
}


def model_folder(name: str) -> Path:
    """The folder of a shape's model; made the first time."""
    from lowrank.models.cache import prepared

    shape = SHAPES[name]
    digest = hashlib.sha256(repr(shape).encode()).hexdigest()[:8]
    return prepared(f"bench-{name}-{digest}", lambda folder: save(shape, folder))


def save(shape: Shape, folder: Path) -> None:
    """Drawn where it is fastest: a model of billions of weights on the GPU, if there is one."""
    from transformers import LlamaForCausalLM

    from lowrank.models.tiny import byte_tokenizer

    with torch.random.fork_rng(), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        config = shape.config
        config.dtype = getattr(torch, shape.dtype)
        before = torch.get_default_dtype()
        torch.set_default_dtype(config.dtype)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    model.save_pretrained(folder)
    byte_tokenizer(adds_bos=True).save_pretrained(folder)


PROMPT = "### Instruction:\n{}\n\n### Response:\n"
AROUND = len(PROMPT.format("")) + 2  # tokens beside the two texts: the byte tokenizer's first and last
LETTERS = "abcdefghijklmnopqrstuvwxyz "


@dataclass(frozen=True)
class Texts:
    """Documents of exact lengths in the byte tokenizer's tokens: ``lengths`` again and again, ``count`` in all."""

    lengths: tuple[int, ...]
    count: int
    share: float = 0.125  # of a document's tokens that are learnt, its end token among them

    def write(self, folder: Path) -> Path:
        """A file whose name tells what is in it."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]
        path = folder / f"texts-{digest}.jsonl"
        draw = random.Random(0)
        rows = (self.row(self.lengths[n % len(self.lengths)], draw) for n in range(self.count))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def row(self, length: int, draw: random.Random) -> dict[str, str]:
        learnt = min(max(1, round(length * self.share) - 1), length - AROUND - 1)
        asked = length - AROUND - learnt
        if asked < 1:
            raise ValueError(f"a document of {length} tokens is too short; {AROUND + 2} at least.")
        return {"instruction": letters(asked, draw), "input": "", "response": letters(learnt, draw)}


def letters(count: int, draw: random.Random) -> str:
    return "".join(draw.choices(LETTERS, k=count))


def spread(mean: int, deviation: float, count: int, longest: int) -> tuple[int, ...]:
    """``count`` lengths whose mean is ``mean`` and whose logarithms' deviation is ``deviation``: quantiles of a
    log-normal, in a fixed shuffled order, none longer than ``longest``."""
    normal = torch.distributions.Normal(0.0, 1.0)
    places = (torch.arange(count) + 0.5) / count
    raw = torch.exp(deviation * normal.icdf(places))  # (count,)
    lengths = (raw * (mean / raw.mean())).clamp(AROUND + 8, longest)
    found: Sequence[int] = [round(float(length)) for length in lengths * (mean / lengths.mean())]
    shuffled = [min(max(length, AROUND + 8), longest) for length in found]
    random.Random(0).shuffle(shuffled)
    return tuple(shuffled)
