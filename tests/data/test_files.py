"""What is wrong with a data file, and the words that say so."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from written import Fields, Settings, jsonl, refused, row, written

from lowrank.data import sources
from lowrank.data.table import Table
from lowrank.errors import DataError


def test_a_column_that_does_not_exist_is_named_with_the_nearest(tmp_path: Path) -> None:
    settings = jsonl(tmp_path / "train.jsonl", [row(1), row(2)])
    assert refused(replace(settings, fields=Fields(response="ouput"))) == (
        "data.fields.response: no column 'ouput' in train.jsonl (has: instruction, input, output). "
        "Did you mean 'output'?"
    )
    assert refused(replace(settings, template="plain")) == (
        "data.fields.text: no column 'text' in train.jsonl (has: instruction, input, output)."
    )
    assert refused(replace(settings, fields=Fields(input="imput"))).startswith(
        "data.fields.input: no column 'imput' in train.jsonl"
    )
    table = written(tmp_path / "train.csv", "instruction,output\na,b\n", "csv")
    assert refused(replace(table, fields=Fields(response="Output"))) == (
        "data.fields.response: no column 'Output' in train.csv (has: instruction, output). Did you mean 'output'?"
    )


def test_a_row_without_a_column_that_other_rows_have_is_named(tmp_path: Path) -> None:
    settings = jsonl(tmp_path / "train.jsonl", [row(1), {"instruction": "ask"}, row(3)])
    assert refused(settings) == ("train.jsonl:2: no 'output' in this row, which data.fields.response names.")


def test_a_line_that_is_not_json_is_shown_with_a_caret(tmp_path: Path) -> None:
    lines = [json.dumps(row(n)) for n in range(1100)]
    lines[1031] = '{"instruction": ask}'
    message = refused(written(tmp_path / "train.jsonl", "\n".join(lines)))
    assert message == (
        'train.jsonl:1032: not valid JSON (column 17).\n  {"instruction": ask}\n                  ^ Expecting value'
    )


def test_a_long_line_is_shortened_around_the_caret(tmp_path: Path) -> None:
    line = '{"instruction": "' + "好" * 500 + '", "output": x, "input": "' + "y" * 500 + '"}'
    _, shown, caret = refused(written(tmp_path / "train.jsonl", line)).split("\n")
    assert shown.startswith("  …好")
    assert shown.endswith("y…")
    before = caret.index("^") - 2
    wide = shown[2:].count("好")
    assert shown[2 + before - wide] == "x"  # the caret stands under it, counted in cells


def test_control_characters_of_a_bad_line_do_not_reach_the_terminal(tmp_path: Path) -> None:
    message = refused(written(tmp_path / "train.jsonl", '{"a":\t"\x1b[31m"}'))
    assert "\x1b" not in message
    assert "\t" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "train.jsonl: no rows."),
        ("\n \n", "train.jsonl: no rows."),
        ("[1, 2]", "train.jsonl:1: a list; one JSON object a line is expected."),
        ('"text"', "train.jsonl:1: a string; one JSON object a line is expected."),
        ("[" * 100_000, "train.jsonl:1: a number too long, or brackets too deep, to be read."),
        ("[" + "1" * 10_000 + "]", "train.jsonl:1: a number too long, or brackets too deep, to be read."),
        (b'{}\n{"a": "caf\xe9"}', "train.jsonl:2: not UTF-8 (byte 11 of the line is 0xe9). Save the file as UTF-8."),
        ("{}".encode("utf-16"), "train.jsonl:1: not UTF-8 but UTF-16 (byte 1 is its mark). Save the file as UTF-8."),
    ],
)
def test_what_is_wrong_with_a_file_is_said(content: str | bytes, expected: str, tmp_path: Path) -> None:
    assert refused(written(tmp_path / "train.jsonl", content)) == expected


def test_a_file_laid_out_over_lines_is_told_what_is_expected(tmp_path: Path) -> None:
    for content in (json.dumps([row(1)], indent=1), json.dumps(row(1), indent=1)):
        message = refused(written(tmp_path / "train.jsonl", content))
        assert message.startswith("train.jsonl:1: not valid JSON (column 2).")
        assert message.endswith("One JSON object a line is expected.")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(3, "a number"), (0.5, "a number"), (True, "a truth value"), (None, "null"), ([], "a list"), ({}, "an object")],
)
def test_a_value_that_is_not_text_is_refused_by_row_and_column(value: object, kind: str, tmp_path: Path) -> None:
    settings = jsonl(tmp_path / "train.jsonl", [row(1), {**row(2), "output": value}])
    assert refused(settings) == f"train.jsonl:2: 'output' is {kind}; a string is needed."


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    settings = written(tmp_path / "train.jsonl", '{"instruction": "a", "output": "b\\ud83d"}')
    assert refused(settings) == ("train.jsonl:1: 'output' holds half a surrogate pair (\\ud83d), which is not text.")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "train.csv: no rows."),
        ("instruction,output\n", "train.csv: no rows."),
        ("a,b,c\n1,2,3\n1,2\n", "train.csv:3: 2 cells, but the header has 3 (a, b, c)."),
        ("a,b\n1\n", "train.csv:2: 1 cell, but the header has 2 (a, b)."),
        ("a,a\n1,2\n", "train.csv:1: the header names 'a' more than once."),
        ('a,b\n1,2\n1,"2\n3,4\n', "train.csv:3: not valid CSV (unexpected end of data)."),
        (b"a,b\n1,\xff\n", "train.csv:2: not UTF-8 (byte 3 of the line is 0xff). Save the file as UTF-8."),
    ],
)
def test_what_is_wrong_with_a_table_is_said(content: str | bytes, expected: str, tmp_path: Path) -> None:
    assert refused(written(tmp_path / "train.csv", content, "csv")) == expected


def test_a_missing_file_is_named_with_the_nearest_in_its_folder(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [row(1)])
    given = str(tmp_path / "trian.jsonl")
    assert refused(Settings(path=given)) == (
        f"data.path: no file '{given}'. Did you mean '{tmp_path / 'train.jsonl'}'?"
    )
    assert refused(Settings(path=str(tmp_path / "zzz"))) == f"data.path: no file '{tmp_path / 'zzz'}'."
    assert "the folder" in refused(Settings(path=str(tmp_path / "nowhere" / "a.jsonl")))
    assert "not a regular file" in refused(Settings(path=str(tmp_path)))
    assert "no file" in refused(Settings(path="x" * 5000))
    assert "no file" in refused(Settings(path="a\0b"))
    evaluation = Settings(path=str(tmp_path / "train.jsonl"), eval_path=given)
    assert refused(evaluation).startswith("data.eval_path: no file")


def test_the_nearest_file_is_suggested_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "train.jsonl", [row(1)])
    assert refused(Settings(path="tran.jsonl")) == ("data.path: no file 'tran.jsonl'. Did you mean 'train.jsonl'?")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_damaged_files_are_read_or_refused_but_never_crash(kind: str, tmp_path: Path) -> None:
    draw = random.Random(kind)
    texts = {
        "jsonl": "".join(json.dumps({**row(n), "output": "é\ud83d\ude42"}) + "\r\n" for n in range(6)),
        "csv": 'instruction,output\n"a,""b\n",c\nd,é\ne,"f"\n',
    }
    whole, path = texts[kind].encode(errors="surrogatepass"), tmp_path / "a"
    outcomes = set()
    for _ in range(600):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(content))
            content[place : place + draw.randint(0, 3)] = draw.choice([b"", b'"', b"\n", b"{", b"\xff", b"\0", b"\\"])
        try:
            sources.load(written(path, bytes(content), kind))
            outcomes.add("read")
        except DataError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_rows_are_streamed_not_read_at_once(tmp_path: Path) -> None:
    settings = written(tmp_path / "a.jsonl", json.dumps(row(1)) + "\nnot json\n")
    assert settings.path is not None
    rows = Table("jsonl", Path(settings.path)).rows()
    assert next(rows) == (1, row(1))  # the second line has not been looked at
    with pytest.raises(DataError):
        next(rows)


def test_a_file_that_may_not_be_read_is_the_machine_s_refusal(hundred: Settings) -> None:
    assert hundred.path is not None
    os.chmod(hundred.path, 0)
    if os.access(hundred.path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(PermissionError):
        sources.load(hundred)
