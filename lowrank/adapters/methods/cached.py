"""What a backbone caches: keys and values by layer, of which shape, and those of a text."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lowrank.errors import ConfigError

CACHE, OLD_CACHE = "cache", "past_key_values"  # the forward's keyword for its cache, in newer and older transformers


def cache_layers(base: Any) -> set[str]:
    """The kinds of layers that transformers caches for a backbone; empty where it takes no cache of tokens."""
    if not {CACHE, OLD_CACHE} & set(inspect.signature(base.forward).parameters):
        return set()
    try:
        return {type(layer).__name__ for layer in DynamicCache(config=base.config).layers}
    except (AttributeError, KeyError, TypeError, ValueError):  # nothing of this configuration sizes such a cache
        return set()


def cached_shape(base: Any) -> tuple[int, int, int]:
    """(layers, key/value heads, head width) of what a backbone caches.

    Raises ConfigError where not every layer keeps keys and values of one shape.
    """
    config: Any = base.config.get_text_config()
    kinds = cache_layers(base)
    layers, heads = getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 0)
    why = None
    if not kinds or not layers or not heads:
        why = "has no cache of keys and values"
    elif kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        why = f"has layers without plain keys and values ({', '.join(sorted(kinds))})"
    elif getattr(config, "kv_lora_rank", None):
        why = "compresses its keys and values (multi-head latent attention)"
    elif "position_ids" not in inspect.signature(base.forward).parameters:
        why = "counts positions itself"
    if why is not None:
        raise ConfigError(f"adapter: {type(base).__name__} {why}, so Prefix has no place in it; lora has.")
    one = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    kept = 1 if one else getattr(config, "num_key_value_heads", None) or heads
    return int(layers), int(kept), getattr(config, "head_dim", None) or config.hidden_size // heads


def compute_dtype(base: Any) -> torch.dtype:
    """What the base's keys come out in."""
    device = base.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.dtype


@torch.no_grad()
def cached(base: Any, tokens: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The keys and values that a backbone caches for a text (k,): (k, layers, 2, kv heads, head width) in fp32.

    Raises ConfigError where they are not of the ``cached_shape`` that its configuration says.
    """
    cache, training = DynamicCache(), [module for module in base.modules() if module.training]
    name = CACHE if CACHE in inspect.signature(base.forward).parameters else OLD_CACHE
    base.eval()  # nothing is dropped, and no generator moves
    try:
        base(input_ids=tokens[None].to(base.device), use_cache=True, **{name: cache})
    finally:
        for module in training:
            module.training = True
    found = [(*layer.keys.shape[1::2], *layer.values.shape[1::2]) for layer in cache.layers]
    if found != [(*shape[1:], *shape[1:])] * shape[0]:
        raise ConfigError(f"adapter: Prefix takes keys and values of one shape; {type(base).__name__} has {found}.")
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # (2, kv heads, k, head width)
    return torch.stack(layers).permute(3, 0, 1, 2, 4).float().cpu()
