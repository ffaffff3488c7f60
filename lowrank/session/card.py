"""What a run is trained on, for ``data.json``: counts, lengths, and a few rows token by token, as it reads them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowrank.assemble import Data
from lowrank.data.chat import Example
from lowrank.secrets import redacted

ROWS = 3  # shown
HEAD, TAIL = 100, 220  # tokens shown of a longer row: the targets stand at its end
BARS = 32  # of a histogram, at most
CHARACTER = 4  # tokens that one character can take: bytes of UTF-8


def card(data: Data, first: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """JSON values. ``first`` are the places, among the training examples, of those that the first step reads."""
    width = 1
    while max(len(example.tokens) for example in (*data.train, *data.eval)) > BARS * width:
        width *= 2
    return {
        "name": data.split.name,
        "sha256": data.split.sha256,
        "notes": list(data.notes),
        "width": width,
        "train": counts(data.train, width),
        "eval": counts(data.eval, width),
        "shown": [row(data.train[place], tokenizer) for place in first[:ROWS]],
    }


def counts(examples: Sequence[Example], width: int) -> dict[str, Any]:
    """Rows, tokens, target tokens and lengths; ``truncated`` rows lost tokens to ``data.max_length``.

    ``lengths`` is a histogram: its i-th number is of the rows that have from i × ``width`` + 1 to (i + 1) × ``width``
    tokens, i from 0.
    """
    lengths = [len(example.tokens) for example in examples]
    found = Counter((length - 1) // width for length in lengths)
    return {
        "rows": len(examples),
        "tokens": sum(lengths),
        "target_tokens": sum(sum(example.target) for example in examples),
        "longest": max(lengths),
        "truncated": sum(example.cut > 0 for example in examples),
        "lengths": [found[place] for place in range(max(found) + 1)],
    }


def row(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """One example as ``runs`` of targets and of others, each the texts of its tokens; of a long one the middle is a run
    that only says how many tokens are ``left_out``."""
    tokens = len(example.tokens)
    if tokens <= HEAD + TAIL:
        found = list(runs(example, range(tokens), tokenizer))
    else:
        middle = {"left_out": tokens - HEAD - TAIL}
        ends = (runs(example, part, tokenizer) for part in (range(HEAD), range(tokens - TAIL, tokens)))
        found = [*next(ends), middle, *next(ends)]
    about = {"row": example.row, "tokens": tokens, "target_tokens": sum(example.target), "cut": example.cut}
    return {**about, "runs": found}


def runs(example: Example, places: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    for target, run in itertools.groupby(places, key=lambda place: example.target[place]):
        texts = list(pieces([example.tokens[place] for place in run], tokenizer))
        whole = "".join(texts)
        hidden = redacted(whole)  # a secret that lies over several tokens would not be seen in one
        yield {"target": target, "pieces": texts if hidden == whole else [hidden]}


def pieces(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text of each token. Tokens that only together make a character are one piece.

    A token is decoded after the one before it: some tokenizers drop the space that a text begins with.
    """
    before = begin = 0
    for end in range(1, len(tokens) + 1):
        known, text = (
            tokenizer.decode(tokens[before:stop], clean_up_tokenization_spaces=False) for stop in (begin, end)
        )
        if text.endswith("\ufffd") and end < len(tokens) and end - begin < CHARACTER:
            continue
        yield text[len(known) :]
        before, begin = begin, end
