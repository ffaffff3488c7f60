"""What a user looks at before training: the rows as the model will read them, target tokens marked."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from lowrank.data.chat import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = ("⟦", "⟧")
COLORS = ("\x1b[30;42m", "\x1b[0m")  # black on green; and back
# Characters of the data that would move the cursor or colour the terminal are shown by their symbols.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def wants_color(stream: TextIO) -> bool:
    """Whether to colour what is written to ``stream``: a terminal, and NO_COLOR (no-color.org) is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def data_masks(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int, *, color: bool = False
) -> str:
    """The first ``limit`` examples with their target tokens marked, and a summary of all of them."""
    start, end = COLORS if color else MARKS
    shown = [masked(example, tokenizer, start, end) for example in examples[: max(limit, 0)]]
    return "\n\n".join([*shown, summary(examples, len(shown))])


def masked(example: Example, tokenizer: PreTrainedTokenizerBase, start: str, end: str) -> str:
    """One example: a line of counts, then its text with ``start`` and ``end`` around each run of targets."""
    head = f"row {example.row}: {len(example.tokens)} tokens, {sum(example.target)} of them targets"
    text = ""
    pairs = zip(example.tokens, example.target, strict=True)
    for is_target, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        decoded = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        decoded = decoded.translate(VISIBLE)
        # A terminal fills the rest of a coloured line, so colour each line by itself.
        text += "\n".join(f"{start}{line}{end}" for line in decoded.split("\n")) if is_target else decoded
    return f"{head}\n{text}"


def summary(examples: Sequence[Example], shown: int) -> str:
    """Counts over all examples: rows, mean and longest length, mean number and share of targets."""
    if not examples:
        return "no rows"
    lengths = [len(example.tokens) for example in examples]
    targets = sum(sum(example.target) for example in examples)
    rows, tokens = len(examples), sum(lengths)
    return (
        f"{shown:,} of {rows:,} rows shown · mean {tokens / rows:.1f} tokens, longest {max(lengths):,} · "
        f"mean {targets / rows:.1f} target tokens, {targets / tokens:.1%} of all"
    )
