"""Models that carry a prefix or a prompt on their backbone, and their texts each alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank.adapters import Adapted, Prefix, Prompt
from lowrank.adapters.inject import apply
from lowrank.adapters.plan import plan
from lowrank.testing.bases import Base

K = 3
METHODS: dict[str, Any] = {
    "prefix": partial(Prefix, length=K, init="random"),
    "prefix by a network": partial(Prefix, length=K, hidden=5),
    "prompt": partial(Prompt, length=K),
}
NEW = 6  # tokens that are generated, greedily
PLAIN: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": NEW}


def carrying(method: str, base: str, seed: int = 0) -> Any:
    """A model (llama, gpt2 or nf4) in fp64 with lowrank's attention and without dropout, and the method on it."""
    model = Base(base, base, "backbone").exact()
    return apply(model, plan(model, {"backbone": METHODS[method]}), seed).double()


def site(model: Any) -> Any:
    """The wrapped backbone."""
    return next(module for module in model.modules() if isinstance(module, Adapted))


def alone(model: Any, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """(tokens, vocabulary) logits of each text in a call of its own: no mask, no boundaries, no positions."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([list(text)]), use_cache=False).logits[0] for text in texts]


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def cache_keyword(model: Any) -> str:
    """What transformers calls the cache, in a forward's arguments and in its output."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def left_padded(texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.int64), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.tensor(list(text))
        mask[row, width - len(text) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
