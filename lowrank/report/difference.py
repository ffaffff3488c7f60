"""Two texts word by word: what went, what came, what stayed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import groupby

_ALONE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts that are written without spaces: a character is a word
_WORD = re.compile(f"[{_ALONE}]|[^\\W{_ALONE}]+|\\s+|[^\\w\\s]")
LONGEST = 1500  # words: longer texts are not compared, which takes the square of their length
Part = tuple[bool, str]  # whether it differs, and the text


def compared(before: str, after: str) -> tuple[list[Part], list[Part]] | None:
    """Each text in parts that the other has too or lacks; joined they are the text. None where they are too long."""
    old, new = _WORD.findall(before), _WORD.findall(after)
    if max(len(old), len(new)) > LONGEST:
        return None
    same = SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    kept_old = {place for a, _, size in same for place in range(a, a + size)}
    kept_new = {place for _, b, size in same for place in range(b, b + size)}
    return list(_parts(old, kept_old)), list(_parts(new, kept_new))


def _parts(words: list[str], kept: set[int]) -> Iterator[Part]:
    """White space differs only between two words of a line that do: a mark goes through it."""
    differs = [place not in kept and not word.isspace() for place, word in enumerate(words)]
    inside = [place for place in range(1, len(words) - 1) if words[place].isspace() and "\n" not in words[place]]
    for place in [place for place in inside if differs[place - 1] and differs[place + 1]]:
        differs[place] = True
    for differing, run in groupby(range(len(words)), key=differs.__getitem__):
        yield differing, "".join(words[place] for place in run)
