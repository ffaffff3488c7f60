"""Prefix tuning: Optimizing Continuous Prompts for Generation (arXiv 2101.00190)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from lowrank.adapters.base import Adapter
from lowrank.adapters.methods.backbone import Call, allowed_length, embeddings, start_tokens
from lowrank.adapters.methods.cached import cache_layers, cached, cached_shape, compute_dtype
from lowrank.adapters.methods.options import positive_integer
from lowrank.errors import ConfigError

SPREAD = 0.1  # of a random start: of 1, a SmolLM2's loss starts at three times the base's
ATTENTION = "lowrank"  # what lowrank.models.attention is registered as: it takes the keyword prefix_kv


class Prefix(Adapter):
    """softmax(q [P_K; K]ᵀ) [P_V; V] in every layer: k keys and values of its own, which train, before a document's.

    P (k, layers·2·width) is a parameter, or P = tanh(E W1ᵀ + b1) W2ᵀ + b2 with E (k, width) and a middle of ``hidden``
    (section 4.3); width is key/value heads · head width. The tokens' positions begin at k. Without the network P starts
    as keys and values of real words, which the paper finds best: of tokens drawn from the ``vocabulary`` or of
    ``init_text``, as for ``Prompt``; or as ``random`` draws of N(0, 0.1²).

    lowrank's attention puts P before every packed document and every row, in sight of a sliding window too, and the
    cache holds tokens alone. A model with another attention gets P as the first entries of its cache: the same for
    rows, but nothing for packs, for gradient checkpointing or for sliding windows, where ConfigError is raised; so it
    is for a model that has no keys and values of one shape in every layer. ValueError for an option out of range.
    """

    sites = ("backbone",)
    identity_at_start = False
    texts = ("init_text",)

    def __init__(
        self,
        base: Any,
        *,
        generator: torch.Generator,
        length: int = 20,
        init: str = "vocabulary",
        init_text: str | Sequence[int] | None = None,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.virtual_tokens = allowed_length(base, length)
        self.hidden = None if hidden is None else positive_integer("hidden", hidden)
        self.layers, self.heads, self.width = cached_shape(base)
        tokens = start_tokens(base, length, init, init_text, generator)  # (k,)
        one, every = self.heads * self.width, self.layers * 2 * self.heads * self.width
        if self.hidden is not None:
            if init == "text":
                raise ValueError(f"init: text is not allowed with hidden={hidden}; the network starts at random.")
            self.embedding = nn.Parameter(torch.empty(length, one).normal_(generator=generator))
            self.weight1, self.bias1 = linear(self.hidden, one, generator)
            self.weight2, self.bias2 = linear(every, self.hidden, generator)
            return
        self.embedding = nn.Parameter(torch.empty(length, every).normal_(0, SPREAD, generator=generator))
        if init != "random" and not embeddings(base).weight.is_meta:  # a stand-in has no values
            self.embedding.data = cached(base, tokens, (self.layers, self.heads, self.width)).flatten(1)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call, k = Call.of(base, args, kwargs), self.virtual_tokens
        if base.config._attn_implementation != ATTENTION:
            return self.through_cache(call)
        call.check_room(k, call.seen)
        prefix = Layers(self.keys_and_values())
        found = call.run(prefix_kv=prefix, position_ids=call.positions(call.seen) + k)
        if len(prefix.taken) < self.layers:
            raise ConfigError(
                f"adapter: {len(prefix.taken)} of {self.layers} layers of {type(base).__name__} took the prefix: its "
                f"attention is not lowrank's, whatever its configuration says."
            )
        return found

    def keys_and_values(self) -> Tensor:
        """(layers, 2, kv heads, k, head width), in fp32."""
        flat: Tensor = self.embedding
        if self.hidden is not None:
            with torch.autocast(flat.device.type, enabled=False):
                middle = torch.tanh(F.linear(flat, self.weight1, self.bias1))  # (k, hidden)
                flat = F.linear(middle, self.weight2, self.bias2)  # (k, layers·2·width)
        return flat.view(-1, self.layers, 2, self.heads, self.width).permute(1, 2, 3, 0, 4)

    def through_cache(self, call: Call) -> Any:
        """P as the first entries of the cache, counted in the mask and the positions."""
        check_cache_serves(call.base, call.lengths is not None)
        k, cache = self.virtual_tokens, DynamicCache() if call.cache is None else call.cache
        seen = max(call.seen - k, 0)  # tokens in the cache, behind P
        call.check_room(k, seen)
        mask = None if call.mask is None else F.pad(call.mask, (k, 0), value=1)
        positions = call.positions(seen) + k
        if call.seen:
            call.check_continues(k)
        else:
            for layer, (keys, values) in enumerate(self.keys_and_values().to(compute_dtype(call.base))):
                every_row = (call.size[0], -1, -1, -1)  # (batch, kv heads, k, head width)
                cache.update(keys.expand(every_row), values.expand(every_row), layer)
        found = call.run(**{call.cache_name: cache}, attention_mask=mask, position_ids=positions)
        if call.cache is None and not call.wants_cache:
            setattr(found, call.cache_name, None)
        return found

    def extra_repr(self) -> str:
        return f"length={self.virtual_tokens}, hidden={self.hidden}"


class Layers:
    """The prefix by layer, and the layers that have taken theirs."""

    def __init__(self, kept: Tensor) -> None:
        self.kept, self.taken = kept.unbind(), set[int]()

    def __getitem__(self, layer: int) -> Tensor:
        self.taken.add(layer)
        return self.kept[layer]  # (2, kv heads, k, head width)


def check_cache_serves(base: Any, packed: bool) -> None:
    """Raises ConfigError for what a prefix cannot do as the first entries of a cache."""
    config, why = base.config.get_text_config(), None
    if packed:
        why = "before every packed document"
    elif torch.is_grad_enabled() and any(recomputes(module) for module in base.modules()):
        why = "under gradient checkpointing"
    elif "DynamicSlidingWindowLayer" in cache_layers(base) or "local" in getattr(config, "attention_layers", ()):
        why = "in sight of a sliding window"
    if why is not None:
        raise ConfigError(
            f"adapter: Prefix keeps {why} only with lowrank's attention (lowrank.models.attention.install), and this "
            f"{type(base).__name__} runs '{base.config._attn_implementation}'. Where it takes no other, use prompt."
        )


def recomputes(module: nn.Module) -> bool:
    """By transformers' own switch, or by lowrank's (lowrank.fast.recompute)."""
    return bool(getattr(module, "gradient_checkpointing", False)) or "repeated" in vars(module)


def linear(out_features: int, in_features: int, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight (out, in) and bias (out,), drawn as nn.Linear draws its own."""
    bound = 1 / math.sqrt(in_features)
    weight, bias = torch.empty(out_features, in_features), torch.empty(out_features)
    return (
        nn.Parameter(weight.uniform_(-bound, bound, generator=generator)),
        nn.Parameter(bias.uniform_(-bound, bound, generator=generator)),
    )
