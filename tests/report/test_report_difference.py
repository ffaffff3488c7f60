"""Words that differ between two texts: marked, and nothing of the texts lost."""

from __future__ import annotations

import random

import pytest

from lowrank.report.difference import LONGEST, compared
from lowrank.report.samples import sample


def marked(before: str, after: str) -> tuple[str, str]:
    """Both texts with brackets around what differs."""
    found = compared(before, after)
    assert found is not None
    old, new = ("".join(f"[{text}]" if differs else text for differs, text in parts) for parts in found)
    return old, new


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("Return the value.", "Return the value.", ("Return the value.", "Return the value.")),
        ("Return the value.", "Return a list.", ("Return [the value].", "Return [a list].")),
        ("a b c", "c a b", ("a b [c]", "[c] a b")),
        ("", "new text", ("", "[new text]")),
        ("one\n  two", "three", ("[one]\n  [two]", "[three]")),  # an indentation is not struck through
        ("返回一个值", "返回两个值", ("返回[一]个值", "返回[两]个值")),
        ("naïve café", "naïve cafés", ("naïve [café]", "naïve [cafés]")),
        ("value", "Value", ("[value]", "[Value]")),
    ],
)
def test_words_that_only_one_text_has_are_marked(before: str, after: str, expected: tuple[str, str]) -> None:
    assert marked(before, after) == expected


def test_no_character_is_lost_and_what_is_unmarked_is_the_same_on_both_sides() -> None:
    drawn = random.Random(0)
    for _ in range(300):
        before, after = ("".join(drawn.choices("ab c.\n\t数é🙂_", k=drawn.randrange(30))) for _ in range(2))
        found = compared(before, after)
        assert found is not None
        assert tuple("".join(text for _, text in parts) for parts in found) == (before, after)
        kept = ["".join(text for differs, text in parts if not differs).split() for parts in found]
        assert "".join(kept[0]) == "".join(kept[1])


def test_texts_too_long_to_compare_are_shown_unmarked() -> None:
    long = "word " * LONGEST
    assert compared(long, "word") is None
    one = sample({"base": long, "tuned": "word", "row": 3})
    assert one.base == [(False, long)]
    assert one.tuned == [(False, "word")]


def test_a_base_that_generated_nothing_is_told_from_one_that_was_not_asked() -> None:
    assert sample({"base": "", "tuned": "x"}).base == []
    assert sample({"base": None, "tuned": "x"}).base is None
