"""CSV and Parquet: a row a group, plain numbers, dotted names."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from sweeping import copied

from lowrank.compare.files import write_csv, write_parquet
from lowrank.compare.groups import gather
from lowrank.compare.ranking import Choice, ranked
from lowrank.errors import ConfigError

LOSS = "eval.after.loss"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_figure_comes_back_as_the_number_it_was(sweep: Path, tmp_path: Path) -> None:
    results = gather([sweep])
    rows = table(write_csv(ranked(results, Choice()), tmp_path / "a.csv"))
    assert len(rows) == 4
    for row in rows:
        (group,) = [
            g
            for g in results.groups
            if {k: g.text(k) for k in results.differing} == {k: row[k] for k in results.differing}
        ]
        found = group.estimate(LOSS)
        assert found is not None
        told = [float(row[f"{LOSS}.{end}"]) for end in ("mean", "low", "high")]
        assert told == [found.mean, found.low, found.high]
        assert row["runs"] == "3"
        assert row["folders"].split("; ") == [run.name for run in group.runs.values()]


def test_only_keys_that_differ_are_columns(sweep: Path, tmp_path: Path) -> None:
    (row, *_) = table(write_csv(ranked(gather([sweep]), Choice()), tmp_path / "a.csv"))
    assert {"adapter.r", "optim.lr"} <= set(row)
    assert not {"loop.seed", "adapter.alpha", "code"} & set(row)
    (row, *_) = table(write_csv(ranked(gather([sweep]), Choice(keys=("adapter.alpha",))), tmp_path / "b.csv"))
    assert "adapter.alpha" in row
    assert "adapter.r" not in row


def test_the_difference_is_from_the_reference_with_its_pairs(sweep: Path, tmp_path: Path) -> None:
    rows = table(write_csv(ranked(gather([sweep]), Choice()), tmp_path / "a.csv"))
    assert rows[0]["reference"] == "true"
    assert rows[0][f"{LOSS}.difference"] == ""
    assert float(rows[-1][f"{LOSS}.difference"]) == pytest.approx(0.52 + 0.09)
    assert rows[-1][f"{LOSS}.difference.n"] == "3"
    assert float(rows[-1][f"{LOSS}.p_exact"]) == 0.25


def test_one_run_has_an_empty_interval_and_a_missing_figure_an_empty_field(original: Path, tmp_path: Path) -> None:
    copied(original, tmp_path / "a", 3.0, adapter__r=4)
    copied(original, tmp_path / "b", None, adapter__r=8)
    rows = table(write_csv(ranked(gather([tmp_path]), Choice()), tmp_path / "a.csv"))
    assert [(row[f"{LOSS}.mean"], row[f"{LOSS}.low"], row[f"{LOSS}.n"]) for row in rows] == [
        ("3", "", "1"),
        ("", "", "0"),
    ]


def test_texts_with_commas_quotes_and_lines_come_back(original: Path, tmp_path: Path) -> None:
    hostile = 'a,"b"\nc;\t<script>é'
    copied(original, tmp_path / "runs" / "with, comma", 3.0, model__name=hostile)
    copied(original, tmp_path / "runs" / "plain", 4.0, adapter__targets=["q_proj", "v_proj"])
    rows = table(write_csv(ranked(gather([tmp_path / "runs"]), Choice()), tmp_path / "a.csv"))
    assert [row["model.name"] for row in rows] == [hostile, "null"]
    assert [row["adapter.targets"] for row in rows] == ["all-linear", "[q_proj,v_proj]"]
    assert rows[0]["folders"] == "with, comma"


def test_without_pyarrow_the_extra_is_named(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"lowrank\[parquet\]"):
        write_parquet(ranked(gather([sweep]), Choice()), tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


def test_parquet_holds_the_same(sweep: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    ranking = ranked(gather([sweep]), Choice())
    rows = table(write_csv(ranking, tmp_path / "a.csv"))
    read = parquet.read_table(write_parquet(ranking, tmp_path / "a.parquet")).to_pydict()
    assert list(read) == list(rows[0])
    assert read["adapter.r"] == [8, 8, 4, 4]
    assert read[f"{LOSS}.mean"] == [float(row[f"{LOSS}.mean"]) for row in rows]
