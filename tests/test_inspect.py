"""What `lowrank inspect data` prints."""

from __future__ import annotations

import io

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowrank import inspect
from lowrank.data import chat
from lowrank.data.sources import Record


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte and an end token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


TOKENIZER = byte_tokenizer()


def make(response: str, row: int = 7) -> chat.Example:
    record = Record(row, {"instruction": "Ask.", "input": "", "response": response})
    return chat.example(record, TOKENIZER, template="instruction", train_on="response", max_length=500)


def test_target_tokens_are_marked_and_counted() -> None:
    example = make("Answer, 你好.")
    count = f"row 7: {len(example.tokens)} tokens, {sum(example.target)} of them targets"
    marked = "### Instruction:\nAsk.\n\n### Response:\n⟦Answer, 你好.<|im_end|>⟧"
    assert inspect.data_masks([example], TOKENIZER, 1).startswith(f"{count}\n{marked}\n\n1 of 1 rows shown")


def test_the_summary_counts_all_rows_and_limit_only_what_is_shown() -> None:
    examples = [make("a" * n, n) for n in range(1, 21)]
    printed = inspect.data_masks(examples, TOKENIZER, 3)
    assert [line.split(":")[0] for line in printed.split("\n") if line.startswith("row ")] == [
        "row 1",
        "row 2",
        "row 3",
    ]
    lengths = [len(e.tokens) for e in examples]
    targets = sum(sum(e.target) for e in examples)
    assert printed.split("\n")[-1] == (
        f"3 of 20 rows shown · mean {sum(lengths) / 20:.1f} tokens, longest {max(lengths)} · "
        f"mean {targets / 20:.1f} target tokens, {targets / sum(lengths):.1%} of all"
    )
    assert inspect.data_masks([], TOKENIZER, 3) == "no rows"


def test_colour_marks_each_line_and_leaves_the_same_text() -> None:
    example = make("one\ntwo")
    colored = inspect.data_masks([example], TOKENIZER, 1, color=True)
    start, end = inspect.COLORS
    assert f"{start}one{end}\n{start}two<|im_end|>{end}" in colored
    plain = inspect.data_masks([example], TOKENIZER, 1)
    assert colored.replace(start, "").replace(end, "") == plain.replace("⟦", "").replace("⟧", "")


def test_control_characters_of_the_data_are_shown_not_sent() -> None:
    printed = inspect.data_masks([make("a\x1b[2Jb\x07\tc\x9b")], TOKENIZER, 1)
    assert "a␛[2Jb␇\tc�" in printed


def test_colour_is_for_terminals_and_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert inspect.wants_color(Terminal())
    assert not inspect.wants_color(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not inspect.wants_color(Terminal())
