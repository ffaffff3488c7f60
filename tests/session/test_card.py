"""data.json: what a run was trained on, row for row and token for token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowrank.assemble import Data
from lowrank.data.chat import Example, examples
from lowrank.data.sources import Split
from lowrank.models.tiny import byte_tokenizer
from lowrank.session import card

PROMPT = "### Instruction:\nSay it.\n\n### Response:\n"
TEXT = "naïve 数字 🙂\tdone\n"


def data(texts: list[str], max_length: int = 4096) -> Data:
    rows = [
        SimpleNamespace(row=n, fields={"instruction": "Say it.", "input": "", "response": t})
        for n, t in enumerate(texts, 1)
    ]
    kept, _ = examples(
        rows, byte_tokenizer(adds_bos=True), template="instruction", train_on="response", max_length=max_length
    )
    return Data(Split([], [], "0" * 64, "mine.jsonl"), kept, kept[:1], ("2 rows dropped",))


def told(texts: list[str], first: list[int], **more: Any) -> dict[str, Any]:
    return card.card(data(texts, **more), first, byte_tokenizer(adds_bos=True))


def joined(row: dict[str, Any], target: bool) -> str:
    return "".join("".join(run["pieces"]) for run in row["runs"] if run.get("target") is target)


def test_a_row_is_shown_as_the_model_reads_it_its_targets_apart() -> None:
    [row] = told([TEXT], [0])["shown"]
    assert joined(row, False) == f"<|bos|>{PROMPT}"
    assert joined(row, True) == f"{TEXT}<|eos|>"
    assert row["tokens"] == sum(len(run["pieces"]) for run in row["runs"]) + len(TEXT.encode()) - len(TEXT)
    assert row["target_tokens"] == len(TEXT.encode()) + 1


def test_a_character_of_several_tokens_is_one_piece_and_broken_bytes_are_not_lost() -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    assert list(card.pieces(list("a🙂数".encode()), tokenizer)) == ["a", "🙂", "数"]
    broken = [*b"a\xf0\x9f", *b"b\xff\xff\xff\xff\xff\xff", *b"c"]
    assert "".join(card.pieces(broken, tokenizer)) == tokenizer.decode(broken)


def test_a_tokenizer_that_drops_a_text_s_first_space_keeps_those_between_its_pieces() -> None:
    backend = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "s": 2}, unk_token="s"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    assert list(card.pieces([0, 1, 2, 0], tokenizer)) == ["one", " two", "s", " one"]


def test_counts_are_those_of_the_examples() -> None:
    texts = ["a", "bb" * 10, "c" * 300]
    found = told(texts, [2, 0], max_length=100)
    train, rows = found["train"], data(texts, max_length=100).train
    assert [train[name] for name in ("rows", "longest", "truncated")] == [3, 100, 1]
    assert train["tokens"] == sum(len(row.tokens) for row in rows)
    assert train["target_tokens"] == sum(sum(row.target) for row in rows)
    assert found["eval"]["rows"] == 1
    assert [row["row"] for row in found["shown"]] == [3, 1]
    assert [row["cut"] for row in found["shown"]] == [1 + len(PROMPT) + 300 + 1 - 100, 0]
    assert (found["name"], found["notes"]) == ("mine.jsonl", ["2 rows dropped"])


@pytest.mark.parametrize("longest", [1, 31, 32, 33, 64, 65, 1000])
def test_the_histogram_has_every_row_in_the_bar_of_its_length(longest: int) -> None:
    rows = [Example(n, (0,) * n, (False,) * n, "", "") for n in range(1, longest + 1)]
    found = card.card(Data(Split([], [], "", ""), rows, rows[:1], ()), [], byte_tokenizer(adds_bos=True))
    width, bars = found["width"], found["train"]["lengths"]
    assert sum(bars) == longest
    assert len(bars) <= card.BARS
    for place, count in enumerate(bars):
        assert count == sum(place * width < len(row.tokens) <= (place + 1) * width for row in rows)


def test_of_a_long_row_both_ends_are_shown_and_the_number_of_tokens_between() -> None:
    [row] = told(["x" * 2000], [0])["shown"]
    [middle] = [run for run in row["runs"] if "left_out" in run]
    assert middle["left_out"] == row["tokens"] - card.HEAD - card.TAIL
    assert row["runs"].index(middle) > 0
    assert joined(row, True).endswith("x<|eos|>")


def test_a_secret_that_lies_over_several_tokens_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "open-sesame-1234")
    [row] = told(["say open-sesame-1234 aloud"], [0])["shown"]
    assert joined(row, True) == "say *** aloud<|eos|>"
