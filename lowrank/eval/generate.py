"""Batched generation whose text depends on the prompt and the seed, not on the batch it was part of.

Sampling is an inverse-CDF draw from one uniform number per (seed, prompt, sequence, position): the numbers
are keyed, so neither the batch size, nor other prompts, nor what was drawn before can change them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lowrank.errors import ConfigError
from lowrank.eval.mode import evaluating
from lowrank.keys import key


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    batch: int = 16,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_return_sequences: int = 1,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> list[list[str]]:
    """``num_return_sequences`` texts for each prompt of token ids, without the prompt and special tokens.

    A text ends before the first end token (the tokenizer's, the model's, or one of ``stop``) or after
    ``max_new_tokens``. Greedy unless ``do_sample``. Only these arguments count: penalties and sampling
    settings that the model's own generation_config brings are left out. The model's training flags and
    torch's generators are as before. Under ``lowrank.use`` with a list each name is a prompt's. ConfigError where a
    prompt leaves no room for the new tokens.
    """
    starts = [list(prompt) or [_start(tokenizer)] for prompt in prompts]
    check_room(model, starts, max_new_tokens)
    ends = _end_tokens(model, tokenizer, stop)
    draws = num_return_sequences if do_sample else 1
    jobs = [(row, draw) for row in range(len(starts)) for draw in range(draws)]
    jobs.sort(key=lambda job: -len(starts[job[0]]))  # like lengths together: little padding
    settings = _settings(tokenizer, ends, max_new_tokens)
    texts: dict[tuple[int, int], str] = {}
    with _inference(model):
        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            sampler = _Sampler(part, seed, max_new_tokens, temperature, top_p) if do_sample else None
            with _rows_of(model, [row for row, _ in part], len(starts)):
                new = _continue(model, [starts[row] for row, _ in part], settings, sampler)
            for job, tokens in zip(part, new, strict=True):
                texts[job] = tokenizer.decode(_until(tokens, ends), skip_special_tokens=True)
    return [[texts[row, draw % draws] for draw in range(num_return_sequences)] for row in range(len(starts))]


def _rows_of(model: PreTrainedModel, rows: list[int], of: int) -> AbstractContextManager[None]:
    """Tells a model that sends each prompt through an adapter of its own which of the prompts a batch is made of."""
    select = getattr(model, "select_rows", None)
    return nullcontext() if select is None else select(rows, of)


def _continue(
    model: PreTrainedModel, prompts: list[list[int]], settings: GenerationConfig, sampler: _Sampler | None
) -> list[list[int]]:
    """The new tokens of each prompt, end token and what follows it included."""
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), settings.pad_token_id)  # (batch, width)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # on the right: the new tokens follow at once
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    out = model.generate(
        tokens.to(device),
        attention_mask=mask.to(device),  # position ids are counted from it
        generation_config=settings,
        logits_processor=LogitsProcessorList([sampler] if sampler else []),
    )
    return out[:, width:].tolist()


class _Sampler(LogitsProcessor):
    """Leaves one finite logit a row, that of the token drawn: the greedy search that follows takes it."""

    def __init__(
        self, jobs: Sequence[tuple[int, int]], seed: int, length: int, temperature: float, top_p: float
    ) -> None:
        drawn = [torch.rand(length, generator=key(seed, "generate", *job), dtype=torch.float64) for job in jobs]
        self.uniform = torch.stack(drawn)  # (batch, length)
        self.temperature, self.top_p = temperature, top_p
        self.position = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = self.uniform[:, self.position].to(scores.device)  # (batch,)
        self.position += 1
        chosen = draw(scores, uniform, self.temperature, self.top_p)  # (batch,)
        only = torch.full_like(scores, -torch.inf)  # (batch, vocabulary)
        return only.scatter_(1, chosen[:, None], 0.0)


def draw(scores: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token at quantile ``uniform`` (batch,) of each row of softmax(``scores`` / temperature).

    Of the probabilities only the largest stay that together reach ``top_p`` (nucleus sampling,
    arXiv 1904.09751); equal ones stay or go together, so no order among them matters.
    """
    p = torch.softmax(scores.double() / temperature, dim=-1)  # (batch, vocabulary)
    if top_p < 1:
        falling = p.sort(dim=-1, descending=True).values
        before = falling.cumsum(-1) - falling  # the mass of all that are larger
        least = falling.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
        p = p.masked_fill(p < least, 0)
    cumulative = p.cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return chosen.squeeze(1).clamp(max=scores.shape[1] - 1)


def _settings(tokenizer: PreTrainedTokenizerBase, ends: set[int], max_new_tokens: int) -> GenerationConfig:
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(ends),
        pad_token_id=padding,
    )


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Sequence[int]) -> set[int]:
    own = model.generation_config.eos_token_id if model.generation_config else None
    listed = own if isinstance(own, list) else [own]  # an id, a list of them, or None
    return {int(token) for token in (tokenizer.eos_token_id, *listed, *stop) if token is not None}


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def _start(tokenizer: PreTrainedTokenizerBase) -> int:
    """What an empty prompt begins with: a model cannot start from nothing."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def check_room(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises ConfigError where a prompt and its new tokens are more than the model has positions for."""
    positions, longest = room(model), max(map(len, prompts), default=0)
    if positions is not None and longest + max_new_tokens > positions:
        raise ConfigError(
            f"eval.generate.max_new_tokens: {max_new_tokens} after a prompt of {longest:,} tokens exceeds the "
            f"model's {positions:,} positions. Lower it, or shorten the prompts (data.max_length)."
        )


def room(model: nn.Module) -> int | None:
    """Positions that a text has: the model's without those that an adapter's own rows take; None without a limit."""
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else positions - taken(model)


def taken(model: nn.Module) -> int:
    """Positions that the own rows of the adapter in use take before every text."""
    return max(getattr(module, "positions_taken", 0) for module in model.modules())


@contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients, a blank generation_config; all of it put back, module by module."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = own
