"""Runs found, grouped over seeds, and compared only where seeds are common."""

from __future__ import annotations

import builtins
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from sweeping import change, copied

from lowrank.compare.groups import gather
from lowrank.errors import ConfigError

LOSS = "eval.after.loss"


def test_a_group_is_a_configuration_and_only_keys_that_differ_are_told(sweep: Path) -> None:
    results = gather([sweep])
    assert [len(group.runs) for group in results.groups] == [3, 3, 3, 3]
    assert results.differing == ["adapter.r", "optim.lr"]
    labels = {group.label(results.differing) for group in results.groups}
    assert labels == {f"adapter.r={r} optim.lr={lr}" for r in (4, 8) for lr in (0.001, 0.01)}


def test_the_mean_is_over_seeds_and_the_best_is_the_lowest_loss(sweep: Path) -> None:
    results = gather([sweep])
    best = results.best(LOSS)
    found = best.estimate(LOSS)
    assert found is not None
    assert best.label(results.differing) == "adapter.r=8 optim.lr=0.001"
    assert found.mean == pytest.approx(3.0 + 0.01 + 0.1 - 0.52)
    assert found.n == 3


def test_a_seed_that_only_one_group_has_is_in_no_difference(sweep: Path, original: Path, tmp_path: Path) -> None:
    extra = copied(original, tmp_path / "more", 99.0, adapter__r=4, optim__lr=1e-3, loop__seed=7)
    results = gather([sweep, extra])
    of = {group.label(results.differing): group for group in results.groups}
    four, eight = of["adapter.r=4 optim.lr=0.001"], of["adapter.r=8 optim.lr=0.001"]
    assert len(four.runs) == 4
    found = four.difference(eight, LOSS)
    assert found is not None
    assert (found.n, found.mean) == (3, pytest.approx(0.52))


def test_without_a_common_seed_there_is_no_difference(original: Path, tmp_path: Path) -> None:
    copied(original, tmp_path / "a", 3.0, adapter__r=4, loop__seed=0)
    copied(original, tmp_path / "b", 2.0, adapter__r=8, loop__seed=1)
    results = gather([tmp_path])
    assert results.differences(LOSS, results.best(LOSS)) == [None, None]


def test_p_values_are_those_of_all_comparisons(sweep: Path) -> None:
    results = gather([sweep])
    tested = [one for one in results.differences(LOSS, results.best(LOSS)) if one]
    raw = sorted(one.difference.p for one in tested if one.difference.p is not None)
    assert min(one.p for one in tested if one.p is not None) == pytest.approx(len(raw) * raw[0])


def test_a_metric_that_is_not_finite_counts_for_no_mean(sweep: Path, original: Path, tmp_path: Path) -> None:
    copied(original, tmp_path / "nan", None, adapter__r=4, optim__lr=1e-3, loop__seed=3)
    results = gather([sweep, tmp_path])
    group = next(group for group in results.groups if len(group.runs) == 4)
    found = group.estimate(LOSS)
    assert found is not None
    assert found.n == 3


def test_runs_that_are_not_done_are_named_with_their_cause(original: Path, tmp_path: Path) -> None:
    for name in ("done", "failed", "stopped", "cut", "torn"):
        copied(original, tmp_path / name, 3.0)
    change(tmp_path / "failed", status="failed", error="step 4: loss is nan.\nmore")
    change(tmp_path / "stopped", status="interrupted")
    (tmp_path / "cut" / "summary.json").unlink()
    (tmp_path / "torn" / "summary.json").write_text('{"status": "do')
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "summary.json").write_text(json.dumps({"status": "failed", "error": "data: no such file"}))
    found = {run.name: (run.status, run.cause) for run in gather([tmp_path]).broken}
    assert found["failed"] == ("failed", "step 4: loss is nan.")
    assert found["refused"] == ("failed", "data: no such file")
    assert found["stopped"][0] == "interrupted"
    assert found["cut"] == ("cut off", "ended without a summary, at step 6 of 6")
    assert found["torn"][0] == "unreadable"
    assert "summary.json" in found["torn"][1]
    assert len(found) == 5


def test_a_run_whose_process_lives_is_running(original: Path, tmp_path: Path) -> None:
    from lowrank.record import lock

    copied(original, tmp_path / "run", 3.0)
    (tmp_path / "run" / "summary.json").unlink()
    with lock.owned(tmp_path / "run"):
        (run,) = gather([tmp_path]).broken
    assert run.status == "running"
    assert f"process {os.getpid()}" in run.cause


def test_a_repeated_run_counts_once_and_the_newer_one(original: Path, tmp_path: Path) -> None:
    for age, name in enumerate(("old", "new")):
        copied(original, tmp_path / name, 3.0 + age)
        os.utime(tmp_path / name / "summary.json", (1000 + age, 1000 + age))
    results = gather([tmp_path])
    (group,) = results.groups
    assert group.values(LOSS) == {("0", "0"): 4.0}
    assert [(old.name, new.name) for old, new in results.repeats] == [("old", "new")]


def test_the_same_configuration_of_other_code_or_data_is_another_group(original: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        copied(original, tmp_path / name, 3.0)
    told = json.loads((tmp_path / "b" / "identity.json").read_text())
    told["identity"] |= {"code": "0" * 64, "data": "1" * 64}
    (tmp_path / "b" / "identity.json").write_text(json.dumps(told))
    results = gather([tmp_path])
    assert set(results.differing) == {"code", "data.sha256"}
    assert len(results.groups) == 2


def test_settings_that_follow_from_the_method_are_no_column(original: Path, tmp_path: Path) -> None:
    copied(original, tmp_path / "lora", 3.0)
    ia3 = {"_target_": "lowrank.adapters.IA3", "targets": ["k_proj"]}
    copied(original, tmp_path / "ia3", 3.1, adapter=ia3)
    results = gather([tmp_path])
    assert "adapter.r" in results.differing
    assert results.telling == ["adapter._target_"]


def test_a_folder_without_runs_or_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run directory in it or below it"):
        gather([tmp_path])
    with pytest.raises(ConfigError, match=r"nowhere: no such folder"):
        gather([tmp_path / "nowhere"])


def test_a_folder_given_twice_is_read_once_and_links_are_not_followed(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sweep)
    assert len(gather([sweep, sweep, tmp_path / "link" / ".." / "grid"]).runs) == 12
    with pytest.raises(ConfigError):
        gather([tmp_path])


def test_a_run_costs_three_files_however_much_lies_in_it(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in range(100):
        copied(original, tmp_path / str(place), 3.0, loop__seed=place)
    opened: list[str] = []
    real_io, real_os = io.open, os.open

    def seen(path: Any, *rest: Any, **more: Any) -> Any:
        opened.append(str(path))
        return real_io(path, *rest, **more)

    def seen_low(path: Any, *rest: Any, **more: Any) -> int:
        opened.append(str(path))
        return real_os(path, *rest, **more)

    monkeypatch.setattr(io, "open", seen)
    monkeypatch.setattr(builtins, "open", seen)
    monkeypatch.setattr(os, "open", seen_low)
    results = gather([tmp_path])
    monkeypatch.undo()
    inside = [Path(path).name for path in opened if path.startswith(str(tmp_path))]
    assert len(results.runs) == 100
    assert {name: inside.count(name) for name in inside} == dict.fromkeys(
        ("config.yaml", "summary.json", "identity.json"), 100
    )
