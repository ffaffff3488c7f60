"""The call of a decoder backbone, read by name, for methods that put rows or columns before every document."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowrank.adapters.base import Adapted
from lowrank.adapters.methods.cached import CACHE, OLD_CACHE
from lowrank.adapters.methods.options import choice, positive_integer
from lowrank.errors import ConfigError


@dataclass(frozen=True)
class Call:
    """What a backbone was called with: documents end to end (``cu_seqlens``), the rows of a batch with a 2D mask or
    with none, or the next tokens of what a cache holds."""

    base: Any
    inputs: dict[str, Any]
    accepted: frozenset[str]  # names of the forward's parameters

    @classmethod
    def of(cls, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        names = list(inspect.signature(base.forward).parameters)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        given = [inputs.pop(name, None) for name in (CACHE, OLD_CACHE)]
        inputs[CACHE if CACHE in names else OLD_CACHE] = given[1] if given[0] is None else given[0]
        return cls(base, inputs, frozenset(names))

    def run(self, **changes: Any) -> Any:
        """The backbone's own forward with some inputs changed; a model that counts positions itself is given none."""
        inputs = {**self.inputs, **changes}
        if "position_ids" not in self.accepted:
            inputs.pop("position_ids", None)
        return self.base(**inputs)

    @property
    def cache_name(self) -> str:
        return CACHE if CACHE in self.accepted else OLD_CACHE

    @property
    def cache(self) -> Any:
        return self.inputs[self.cache_name]

    @property
    def wants_cache(self) -> bool:
        given = self.inputs.get("use_cache")
        return bool(getattr(self.base.config, "use_cache", False) if given is None else given)

    @property
    def seen(self) -> int:
        """Entries that the cache holds."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    @property
    def size(self) -> tuple[int, int]:
        """(batch, tokens) of this call."""
        ids = self.inputs.get("input_ids")
        batch, tokens = (self.inputs["inputs_embeds"] if ids is None else ids).shape[:2]
        return batch, tokens

    @cached_property
    def lengths(self) -> list[int] | None:
        """Of the packed documents; None where the call is a batch of rows."""
        edges = self.inputs.get("cu_seqlens")
        return None if edges is None else edges.diff().tolist()

    @property
    def mask(self) -> Tensor | None:
        """The mask (batch, tokens seen and these) of a batch of rows; None where nothing is hidden.

        Raises ConfigError where it is one that was prepared for the attention (a static cache brings one).
        """
        mask = self.inputs.get("attention_mask") if self.lengths is None else None
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise ConfigError(
                "adapter: a mask of (batch, tokens) is needed before this backbone, or none: a prepared 4D mask, such "
                "as a static cache brings, has no columns for what the adapter adds. Generate with a dynamic cache."
            )
        return mask

    def embeddings(self) -> Tensor:
        """(batch, tokens, hidden)"""
        given = self.inputs.get("inputs_embeds")
        return self.base.get_input_embeddings()(self.inputs["input_ids"]) if given is None else given

    def positions(self, seen: int) -> Tensor:
        """Those given or, behind ``seen`` tokens, those of the mask's visible tokens: (batch or 1, tokens)."""
        given, (_, tokens) = self.inputs.get("position_ids"), self.size
        if given is not None:
            return given
        if self.mask is not None:
            return (self.mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        inputs = self.inputs.get("input_ids")
        device = (self.inputs["inputs_embeds"] if inputs is None else inputs).device
        return torch.arange(seen, seen + tokens, device=device)[None]

    @cached_property
    def first(self) -> Tensor | None:
        """(batch, 1): the place of each row's first visible token; None where nothing is hidden."""
        return None if self.mask is None else self.mask.to(torch.int8).argmax(-1, keepdim=True)

    def before_each(self, front: Tensor, rows: Tensor) -> Tensor:
        """``front`` (k, …) before the first visible token of each row of ``rows`` (batch, tokens, …), behind what pads
        it on the left, or before each of the packed documents: (batch, …, …)."""
        if self.lengths is not None:
            return torch.cat([part for document in rows[0].split(self.lengths) for part in (front, document)])[None]
        batch, k = self.size[0], len(front)
        joined = torch.cat([front.expand(batch, *front.shape), rows.expand(batch, *rows.shape[1:])], dim=1)
        if self.first is None:
            return joined
        place = torch.arange(joined.shape[1], device=joined.device)
        within = place - self.first  # (batch, k + tokens): from each row's first visible token on
        order = torch.where(within < 0, place + k, torch.where(within < k, within, place))
        return joined[torch.arange(batch, device=joined.device)[:, None], order]

    def wider(self, k: int) -> dict[str, Any]:
        """The boundaries, or the mask, with k entries in sight before each document."""
        if self.lengths is not None:
            edges = self.inputs["cu_seqlens"]
            return {"cu_seqlens": edges + k * torch.arange(len(edges), device=edges.device)}
        return {"attention_mask": None if self.mask is None else self.before_each(self.mask.new_ones(k), self.mask)}

    def without_front(self, found: Any, k: int) -> Any:
        """A backbone's output without the rows over what ``before_each`` put in."""

        def rest(rows: Tensor) -> Tensor:
            if self.lengths is not None:
                return torch.cat([part[k:] for part in rows[0].split([k + n for n in self.lengths])])[None]
            if self.first is None:
                return rows[:, k:]
            place = torch.arange(rows.shape[1] - k, device=rows.device)
            kept = place + k * (place >= self.first)  # (batch, tokens)
            return rows[torch.arange(len(rows), device=rows.device)[:, None], kept]

        found.last_hidden_state = rest(found.last_hidden_state)
        if found.get("hidden_states") is not None:
            found.hidden_states = tuple(rest(layer) for layer in found.hidden_states)
        return found

    def check_room(self, added: int, seen: int = 0) -> None:
        """Raises ConfigError where the positions do not suffice for ``seen`` tokens, these, and what is added."""
        positions, lengths = limit(self.base), self.lengths
        longest = seen + self.size[1] if lengths is None else max(lengths)
        if positions is not None and longest + added > positions:
            raise ConfigError(
                f"adapter.length: {added} before a text of {longest:,} tokens exceeds the model's {positions:,} "
                f"positions. Lower it, or shorten the texts (data.max_length)."
            )

    def check_continues(self, added: int) -> None:
        """Raises ConfigError unless these are the next tokens of a text that the cache holds behind what was added."""
        given, (_, tokens) = self.inputs.get("position_ids"), self.size
        text = self.seen - added + tokens
        counted = text if given is None else int(given.max()) + 1
        counted = counted if self.mask is None else self.mask.shape[1]
        if counted != text:
            raise ConfigError(
                f"adapter: the cache holds {self.seen} entries, {added} of them the adapter's, which do not fit a text "
                f"of {counted} tokens that ends in these {tokens}. Start from an empty cache and the whole text."
            )


def limit(base: Any) -> int | None:
    """The positions that a model has; None where it says nothing."""
    found = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def allowed_length(base: Any, value: object) -> int:
    """Raises ValueError unless ``value`` is a number of rows that leaves the model's positions for a text."""
    length, positions = positive_integer("length", value), limit(base)
    if positions is not None and length >= positions:
        raise ValueError(f"length: {length} is not allowed; fewer than the model's {positions:,} positions.")
    return length


def embeddings(base: Any) -> Any:
    """The table of a backbone's input embeddings, bare."""
    table = base.get_input_embeddings()
    return table.base if isinstance(table, Adapted) else table


def start_tokens(
    base: Any, length: int, init: str, text: str | Sequence[int] | None, generator: torch.Generator
) -> Tensor:
    """(length,) tokens to start from: those of the text, over again or cut, or drawn from the vocabulary.

    Raises ValueError where ``init`` is none of vocabulary, text and random, or the text not the model's tokens, or
    there for an ``init`` that does not read it.
    """
    vocabulary = len(embeddings(base).weight)
    drawn = torch.randint(0, vocabulary, (length,), generator=generator, device="cpu")
    if choice("init", init, ("vocabulary", "text", "random")) != "text":
        if text is not None:
            raise ValueError(f"init_text: a text is not allowed with init={init}; null, or init=text.")
        return drawn
    if isinstance(text, str) or not isinstance(text, Sequence) or not text:
        raise ValueError(f"init_text: {text!r} is not allowed with init=text; a text, from Python as its token ids.")
    wrong = [token for token in text if not isinstance(token, int) or not 0 <= token < vocabulary]
    if wrong:
        raise ValueError(f"init_text: token {wrong[0]!r} is not allowed; the model has {vocabulary:,}.")
    return torch.tensor(list(text)[:length], device="cpu").repeat(-(-length // len(text)))[:length]
