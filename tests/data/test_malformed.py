"""Rows and files that nobody vouches for: an error with the row's number, or by policy dropped and counted."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from written import Fields, Settings, refused, row, written

from lowrank.data import sources, table
from lowrank.data.table import Table
from lowrank.errors import ConfigError, DataError

GOOD = [json.dumps(row(n)).encode() for n in range(1, 9)]
BAD = {  # one row of a jsonl file, and why it is dropped
    "no JSON": (b'{"instruction": ', "not valid JSON (column 17)"),
    "no object": (b"[1]", "a list; one JSON object a line is expected"),
    "not UTF-8": (b'{"instruction": "\xff"}', "not UTF-8 (byte 18 of the line is 0xff). Save the file as UTF-8"),
    "a zero byte": (b'{"instruction": "\0"}', "holds a zero byte (byte 18 of the line), which is not text"),
    "half a character": (
        b'{"instruction": "a", "output": "\\ud83d"}',
        "'output' holds half a surrogate pair (\\ud83d)",
    ),
    "a number": (b'{"instruction": "a", "output": 3}', "'output' is a number; a string is needed"),
    "a table in a cell": (b'{"instruction": "a", "output": {"b": []}}', "'output' is an object; a string is needed"),
    "no such column": (b'{"instruction": "a"}', "no 'output' in this row, which data.fields.response names"),
    "a name twice": (b'{"instruction": "a", "output": "b", "output": "c"}', "'output' is there more than once"),
    "too deep": (b"[" * 100_000, "a number too long, or brackets too deep, to be read"),
    "too many digits": (b'{"n": ' + b"1" * 10_000 + b"}", "a number too long, or brackets too deep, to be read"),
}


def file_of(path: Path, lines: list[bytes], **settings: object) -> Settings:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return replace(Settings(path=str(path)), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_cannot_be_used_is_an_error_with_its_number_or_dropped(case: str, tmp_path: Path) -> None:
    bad, why = BAD[case]
    settings = file_of(tmp_path / "a.jsonl", [*GOOD[:4], bad, *GOOD[4:]])
    assert refused(settings).startswith(f"a.jsonl:5: {why}")
    split = sources.load(replace(settings, on_malformed="drop"))
    kept = sorted([*split.train, *split.eval], key=lambda record: record.row)
    assert [record.row for record in kept] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert [record.fields for record in kept][4]["response"] == "answer 5"
    (note,) = split.notes
    assert note.startswith(f"data: 1 of 9 rows of a.jsonl dropped (row 5: {why}")


def test_the_note_counts_all_and_names_the_first_three(tmp_path: Path) -> None:
    lines = [good for pair in zip(GOOD, [b"x"] * len(GOOD), strict=True) for good in pair]
    (note,) = sources.load(file_of(tmp_path / "a.jsonl", lines, on_malformed="drop")).notes
    wrong = "not valid JSON (column 1)"
    assert note == f"data: 8 of 16 rows of a.jsonl dropped (row 2: {wrong}; row 4: {wrong}; row 6: {wrong}; …)"
    assert sources.load(file_of(tmp_path / "b.jsonl", GOOD, on_malformed="drop")).notes == ()


def test_a_file_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    settings = file_of(tmp_path / "a.jsonl", [b"x", b"y"], on_malformed="drop")
    assert refused(settings).startswith("a.jsonl: none of its 2 rows can be read (row 1: not valid JSON")
    assert refused(file_of(tmp_path / "a.jsonl", [b""], on_malformed="drop")) == "a.jsonl: no rows."


def test_a_column_that_no_row_has_is_a_mistake_of_the_configuration_under_either_policy(tmp_path: Path) -> None:
    settings = file_of(tmp_path / "a.jsonl", GOOD, fields=Fields(response="ouput"))
    for policy in ("error", "drop"):
        assert refused(replace(settings, on_malformed=policy)).startswith("data.fields.response: no column 'ouput'")


# Tables


@pytest.mark.parametrize(
    ("bad", "numbers"),
    [
        ('"never closed,2', [3]),
        ('x,"never closed', [3]),
        ('"closed"too late,2', [3]),
        ("1,2,3", [3]),
        ("1", [3]),
        ('"two\nlines",2,3', [3]),
        ('1,"2\n"x"y,4', [3, 4]),
        ("nul\0,1", [3]),
    ],
)
def test_a_bad_row_of_a_table_swallows_no_other(bad: str, numbers: list[int], tmp_path: Path) -> None:
    after = "".join(f'"ask, {n}","{n}"\n' if n % 2 else f"ask {n},{n}\n" for n in range(20))
    settings = written(tmp_path / "a.csv", f"instruction,output\na,b\n{bad}\n{after}", "csv")
    assert refused(settings).startswith("a.csv:3: ")
    read = Table("csv", tmp_path / "a.csv", "drop")
    kept = [cells["output"] for _, cells in read.rows()]
    assert kept == ["b", *(str(n) for n in range(20))]
    assert (read.dropped, list(read.reasons)) == (len(numbers), numbers)


def test_a_quote_that_is_never_closed_costs_no_second_reading_of_each_line(tmp_path: Path) -> None:
    text = "a,b\n" + ('"open,1\n' + "5,6\n" * 1000) * 50
    written(tmp_path / "a.csv", text, "csv")
    read = Table("csv", tmp_path / "a.csv", "drop")
    assert sum(1 for _ in read.rows()) == 50_000
    assert read.dropped == 50


def test_a_header_that_cannot_be_read_is_an_error_under_either_policy(tmp_path: Path) -> None:
    for policy in ("error", "drop"):
        settings = replace(written(tmp_path / "a.csv", 'a,"b\n1,2\n', "csv"), on_malformed=policy)
        assert refused(settings) == "a.csv:1: not valid CSV (unexpected end of data)."


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_lines_that_end_in_cr_alone_are_told(kind: str, tmp_path: Path) -> None:
    content = b"\r".join(GOOD) if kind == "jsonl" else b"instruction,output\ra,b\rc,d"
    assert "end in CR alone; save it with LF" in refused(written(tmp_path / "a", content, kind))


# Whole files


@pytest.mark.parametrize("policy", ["error", "drop"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (gzip.compress(b"\n".join(GOOD)), "compressed (gzip): gunzip it."),
        (b"PK\x03\x04rest", "a zip archive: unzip it."),
        (b"\x28\xb5\x2f\xfdrest", "compressed (zstd): unzstd it."),
        (b"PAR1rest", "a Parquet file: write it as jsonl."),
        ("{}".encode("utf-16"), "not UTF-8 but UTF-16 (byte 1 is its mark). Save the file as UTF-8."),
    ],
)
def test_a_file_of_another_kind_is_called_by_it(policy: str, content: bytes, told: str, tmp_path: Path) -> None:
    settings = replace(written(tmp_path / "a.jsonl", content), on_malformed=policy)
    assert refused(settings) == f"a.jsonl:1: {told}"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_line_without_an_end_is_refused_without_being_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write(b'{"instruction": "')
        file.seek(10 * 2**30)  # ten gigabytes, of which the disk has none
        file.write(b"\n")
    assert refused(Settings(kind=kind, path=str(path))) == "a:1: longer than 64 MiB, which no row may be."


def test_a_line_too_long_is_dropped_and_what_follows_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "LONGEST", 1000)
    settings = file_of(tmp_path / "a.jsonl", [GOOD[0], b"x" * 5000, b"y" * 1000, *GOOD[1:]], on_malformed="drop")
    split = sources.load(settings)
    assert sorted(record.row for record in (*split.train, *split.eval)) == [1, *range(4, 11)]
    assert split.sha256 == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()


def test_a_row_of_a_table_may_be_no_longer_than_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "LONGEST", 1000)
    text = "a,b\n" + '1,"' + "open\n" * 1000 + "3,4\n"
    written(tmp_path / "a.csv", text, "csv")
    read = Table("csv", tmp_path / "a.csv", "drop")
    assert [cells for _, cells in read.rows()] == [{"a": "3", "b": "4"}]
    assert read.reasons[2] == "longer than 0 MiB, which no row may be."


def test_a_pipe_is_refused_and_waited_for_by_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refused(Settings(path=str(tmp_path / "pipe"))) == f"data.path: '{tmp_path / 'pipe'}' is not a regular file."


def test_the_hash_is_that_of_what_was_read_dropped_rows_included(tmp_path: Path) -> None:
    lines = [*GOOD, b"not JSON", b"\xff\xff"]
    split = sources.load(file_of(tmp_path / "a.jsonl", lines, on_malformed="drop"))
    assert split.sha256 == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    file_of(path, GOOD * 5000)
    rows = Table("jsonl", path).rows()
    next(rows)
    with path.open("ab") as file:
        file.write(GOOD[0] + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        list(rows)


# Anything


def mutations(kind: str, rounds: int) -> Iterator[bytes]:
    draw = random.Random(f"{kind} malformed")
    whole = {
        "jsonl": b"\r\n".join([*GOOD, json.dumps({**row(9), "output": "é🙂"}).encode()]),
        "csv": 'instruction,output\n"a,""b\n",c\nd,é\ne,"f"\n"g\r\n",h\n'.encode(),
    }[kind]
    pieces = [
        b"",
        b'"',
        b"\n",
        b"\r",
        b"{",
        b"}",
        b",",
        b"\xff",
        b"\0",
        b"\\",
        b"\\ud800",
        b"[" * 2000,
        b"9" * 5000,
        b"NaN",
    ]
    for _ in range(rounds):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 5)):
            place = draw.randrange(len(content) + 1)
            content[place : place + draw.randint(0, 3)] = draw.choice(pieces)
        yield bytes(content)


def check_mutations(kind: str, rounds: int, path: Path) -> None:
    outcomes = set()
    for content in mutations(kind, rounds):
        for policy in ("error", "drop"):
            try:
                split = sources.load(replace(written(path, content, kind), on_malformed=policy))
                outcomes.add((policy, "dropped" if split.notes else "read"))
            except (DataError, ConfigError):
                outcomes.add((policy, "refused"))
    assert outcomes >= {("error", "read"), ("error", "refused"), ("drop", "read"), ("drop", "dropped")}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_mutated_rows_are_read_dropped_or_refused(kind: str, tmp_path: Path) -> None:
    check_mutations(kind, 300, tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_many_mutated_rows_are_read_dropped_or_refused(kind: str, tmp_path: Path) -> None:
    check_mutations(kind, 20_000, tmp_path / "a")
