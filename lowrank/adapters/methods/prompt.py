"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (arXiv 2104.08691)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lowrank.adapters.base import Adapter
from lowrank.adapters.methods.backbone import Call, allowed_length, embeddings, start_tokens
from lowrank.adapters.methods.cached import cache_layers
from lowrank.errors import ConfigError

STARTS = ("random", "vocabulary", "text")


class Prompt(Adapter):
    """The model reads [P; X] for every document X: P (k, hidden), which trains, stands before X's embeddings.

    The rows of P are in the space of what ``get_input_embeddings()`` returns, so where a model scales that, P is scaled
    with it. Each packed document gets its own P, positions move on by k, and the outputs over P are dropped. In
    generation P enters the empty cache with the first tokens.

    P starts (section 3.2) as the embeddings of tokens drawn from the ``vocabulary``, as those of the tokens of
    ``init_text``, over again where k is more, or as ``random`` draws of N(0, σ²) with the embeddings' own σ. The text
    is token ids here; a run makes them of the text that its configuration holds.

    Raises ValueError for an option out of range, ConfigError for a model without a cache of keys and values.
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
    ) -> None:
        super().__init__()
        self.virtual_tokens = allowed_length(base, length)
        tokens = start_tokens(base, length, init, init_text, generator)  # (k,)
        if not any(layer.startswith("Dynamic") for layer in cache_layers(base)):
            raise ConfigError(f"adapter: {type(base).__name__} has no cache of keys and values, which Prompt needs.")
        table = embeddings(base)
        self.embedding = nn.Parameter(torch.zeros(length, table.weight.shape[1]))
        if table.weight.is_meta:
            return  # a stand-in has no values to start from
        values = table(tokens.to(table.weight.device)).detach().float().cpu()  # (k, hidden)
        if init == "random":
            values = torch.randn(values.shape, generator=generator) * table.weight.detach().float().std().item()
        self.embedding.data = values

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call, k = Call.of(base, args, kwargs), self.virtual_tokens
        seen = max(call.seen - k, 0)  # tokens in the cache, behind P
        call.check_room(k, seen)
        positions = call.positions(seen) + k  # (batch or 1, tokens)
        if call.seen:
            call.check_continues(k)
            return call.run(position_ids=positions, **call.wider(k))
        embeddings = call.embeddings()  # (batch, tokens, hidden)
        found = call.run(
            input_ids=None,
            inputs_embeds=call.before_each(self.embedding.to(embeddings.dtype), embeddings),
            position_ids=call.before_each(torch.arange(k, device=positions.device), positions),
            **call.wider(k),
        )
        return call.without_front(found, k)

    def extra_repr(self) -> str:
        return f"length={self.virtual_tokens}"
