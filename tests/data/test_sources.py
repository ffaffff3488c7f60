"""Records and the split: what is read, and what the seed decides."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from written import Fields, Settings, jsonl, refused, row, written

from lowrank.data import sources
from lowrank.errors import ConfigError


def everything(split: sources.Split) -> list[sources.Record]:
    return sorted(split.train + split.eval, key=lambda record: record.row)


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────


def test_every_row_of_a_file_is_in_exactly_one_half(hundred: Settings) -> None:
    split = sources.load(hundred)
    assert (len(split.train), len(split.eval), split.name) == (90, 10, "train.jsonl")
    fields = [
        {"instruction": r["instruction"], "input": r["input"], "response": r["output"]} for r in map(row, range(1, 101))
    ]
    assert everything(split) == [sources.Record(n, f) for n, f in enumerate(fields, 1)]


def test_both_halves_keep_the_order_of_the_file(hundred: Settings) -> None:
    split = sources.load(replace(hundred, limit=30))
    for records in (split.train, split.eval):
        assert [record.row for record in records] == sorted(record.row for record in records)


def test_the_sha256_is_the_file_s_and_covers_both_files(hundred: Settings, tmp_path: Path) -> None:
    assert hundred.path is not None
    plain = hashlib.sha256(Path(hundred.path).read_bytes()).hexdigest()
    assert sources.load(hundred).sha256 == plain
    other = tmp_path / "eval.jsonl"
    seen = {plain}
    for rows in ([row(1)], [row(2)]):
        jsonl(other, rows)
        split = sources.load(replace(hundred, eval_path=str(other)))
        assert (len(split.train), len(split.eval), split.name) == (100, 1, "train.jsonl, eval.jsonl")
        assert split.sha256 not in seen
        seen.add(split.sha256)


def test_csv_and_jsonl_of_the_same_rows_give_the_same_records(tmp_path: Path) -> None:
    rows = [{**row(n), "output": f'"{n}",\nand\tmore, 你好 {n}'} for n in range(20)]
    settings = jsonl(tmp_path / "a.jsonl", rows)
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    left = sources.load(settings)
    right = sources.load(Settings(kind="csv", path=str(tmp_path / "a.csv")))
    assert [r.fields for r in left.train] == [r.fields for r in right.train]
    assert [r.fields for r in left.eval] == [r.fields for r in right.eval]


def test_a_csv_row_is_numbered_by_the_line_it_starts_on(tmp_path: Path) -> None:
    text = 'instruction,output\n\na,"1\n2\n3"\nb,4\n'
    split = sources.load(written(tmp_path / "a.csv", text, "csv"))
    assert [(r.row, r.fields["response"]) for r in everything(split)] == [(3, "1\n2\n3"), (6, "4")]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(kind: str, tmp_path: Path) -> None:
    texts = {
        "jsonl": "".join(json.dumps(row(n)) + "\n" for n in range(10)),
        "csv": "instruction,input,output\n" + "".join(f"ask {n},about {n},answer {n}\n" for n in range(10)),
    }
    usual = sources.load(written(tmp_path / "a", texts[kind], kind))
    odd = sources.load(written(tmp_path / "b", "\ufeff" + texts[kind].replace("\n", "\r\n"), kind))
    assert (odd.train, odd.eval) == (usual.train, usual.eval)


def test_blank_lines_are_passed_over_and_still_counted(tmp_path: Path) -> None:
    text = f"\n{json.dumps(row(1))}\n  \n{json.dumps(row(2))}"
    assert [r.row for r in everything(sources.load(written(tmp_path / "a", text)))] == [2, 4]


def test_an_absent_or_null_input_is_the_empty_string(tmp_path: Path) -> None:
    short = {"instruction": "ask", "output": "answer"}
    for rows in ([short] * 3, [short, {**short, "input": None}, {**short, "input": ""}]):
        split = sources.load(jsonl(tmp_path / "a", list(rows)))
        assert {r.fields["input"] for r in everything(split)} == {""}
    unnamed = replace(jsonl(tmp_path / "a", [row(1), row(2)]), fields=Fields(input=None))
    assert {r.fields["input"] for r in everything(sources.load(unnamed))} == {""}


def test_plain_reads_the_text_column_alone(tmp_path: Path) -> None:
    settings = replace(jsonl(tmp_path / "a", [{"text": "one"}, {"text": "two"}]), template="plain")
    assert [r.fields for r in everything(sources.load(settings))] == [{"text": "one"}, {"text": "two"}]


def test_a_csv_cell_may_be_long_and_the_csv_module_is_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    text = "instruction,output\na," + "x" * 300_000 + "\nb,c\n"
    split = sources.load(written(tmp_path / "a.csv", text, "csv"))
    assert len(everything(split)[0].fields["response"]) == 300_000
    assert csv.field_size_limit() == before


# ── what the seed decides ────────────────────────────────────────────────────────────────────────────────


def test_the_same_seed_gives_the_same_split_and_another_seed_another(hundred: Settings) -> None:
    limited = replace(hundred, limit=20)
    assert sources.load(limited) == sources.load(limited)
    other = sources.load(replace(limited, seed=1))
    assert other.eval != sources.load(limited).eval
    assert other.train != sources.load(limited).train


def test_a_limit_takes_a_subset_of_the_training_records_and_leaves_evaluation_alone(hundred: Settings) -> None:
    whole = sources.load(hundred)
    small, large = (sources.load(replace(hundred, limit=n)) for n in (10, 50))
    assert small.eval == large.eval == whole.eval
    rows = [{r.row for r in split.train} for split in (small, large, whole)]
    assert rows[0] < rows[1] < rows[2]
    assert [len(r) for r in rows] == [10, 50, 90]
    assert rows[0] != {r.row for r in whole.train[:10]}  # a sample, not the head of the file
    assert sources.load(replace(hundred, limit=1000)).train == whole.train


def test_at_least_one_row_is_held_out_of_a_small_file(tmp_path: Path) -> None:
    split = sources.load(jsonl(tmp_path / "a", [row(1), row(2)]))
    assert (len(split.train), len(split.eval)) == (1, 1)


@pytest.mark.parametrize("seed", range(20))
def test_whole_groups_are_held_out_up_to_the_fraction(seed: int) -> None:
    draw = random.Random(seed)
    groups = [name for name in range(40) for _ in range(draw.randint(1, 30))]
    chosen = sources.held_out(groups, 0.1, seed)
    inside = {group for group, is_eval in zip(groups, chosen, strict=True) if is_eval}
    outside = {group for group, is_eval in zip(groups, chosen, strict=True) if not is_eval}
    assert not inside & outside
    assert 0.08 * len(groups) <= sum(chosen) <= 0.1 * len(groups) + 1


def test_no_module_of_the_library_is_on_both_sides() -> None:
    found = sources.stdlib.functions()
    split = sources.load(Settings(kind="stdlib"))
    train, held = ({found[record.row - 1].module for record in half} for half in (split.train, split.eval))
    assert train.isdisjoint(held)
    assert len(split.train) + len(split.eval) == len(found)
    assert 0.09 < len(split.eval) / len(found) < 0.11
    assert len(held) > 10
    assert split.train[0].fields.keys() == {"instruction", "input", "response"}


def test_a_split_without_a_row_on_one_side_is_refused(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "train.jsonl", [row(1)])
    assert refused(one) == (
        "data: train.jsonl gives 0 records to train on, 1 to evaluate on; at least one of each is needed."
    )
    two = jsonl(tmp_path / "train.jsonl", [row(1), row(2)])
    assert "2 records to train on, 0 to evaluate on" in refused(replace(two, eval_fraction=0.0))


def test_settings_that_do_not_go_together_are_configuration_errors(hundred: Settings) -> None:
    assert refused(Settings(), ConfigError).startswith("data.path: not set")
    assert refused(Settings(kind="stdlib", path="a.jsonl"), ConfigError).startswith("data.path: data=stdlib")
    assert refused(Settings(kind="stdlib", template="plain"), ConfigError).startswith("data.template: 'plain'")
    unnamed = replace(hundred, fields=Fields(response=None))
    assert refused(unnamed, ConfigError).startswith("data.fields.response: not set")
