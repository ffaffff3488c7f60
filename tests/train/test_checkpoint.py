"""A checkpoint appears whole or not at all, and no bit of it changes unseen."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank import manifest
from lowrank.errors import NumericsError, RefusedError
from lowrank.keys import key
from lowrank.train import checkpoint, tensors
from lowrank.train.checkpoint import Checkpoints, Saved, committed, newest, read, save, verify
from lowrank.train.hooks import StepRecord


def saved(step: int, **state: Any) -> Saved:
    generator = key(0, step)
    adapter = {"q.adapter.A": torch.randn(2, 3, generator=generator), "q.adapter.B": torch.zeros(3, 2).bfloat16()}
    optimizer = {"q.adapter.A|step": torch.tensor(float(step)), "q.adapter.A|exp_avg": torch.ones(2, 3)}
    return Saved({"adapter": adapter, "optimizer": optimizer}, {"step": step, "identity": {"optim.lr": 1e-4}, **state})


def equal(one: Saved, other: Saved) -> bool:
    return (
        one.state == other.state
        and one.tensors.keys() == other.tensors.keys()
        and all(
            one.tensors[file].keys() == other.tensors[file].keys()
            and all(torch.equal(t, other.tensors[file][name]) for name, t in one.tensors[file].items())
            and all(t.dtype == other.tensors[file][name].dtype for name, t in one.tensors[file].items())
            for file in one.tensors
        )
    )


def names(folder: Path) -> list[str]:
    return [path.name for path in committed(folder)]


def test_what_is_saved_is_read_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 7, saved(7))
    assert path == tmp_path / "checkpoints" / "step-00000007"
    assert verify(path) is None
    assert equal(read(path), saved(7))


def test_a_checkpoint_is_safetensors_and_json_and_nothing_else(tmp_path: Path) -> None:
    path = save(tmp_path, 1, saved(1))
    assert sorted(file.name for file in path.iterdir()) == [
        "MANIFEST.json", "adapter.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    for file in path.iterdir():
        assert not file.read_bytes().startswith((b"\x80", b"PK"))  # a pickle, torch's zip of pickles
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    assert manifest["step"] == 1
    for name, facts in manifest["files"].items():
        assert facts["bytes"] == (path / name).stat().st_size
        assert len(facts["sha256"]) == 64


def test_tensors_that_share_memory_are_saved_as_they_are(tmp_path: Path) -> None:
    table = torch.arange(6.0)
    views = {"a": table, "b": table, "c": table[2:], "d": table.view(2, 3).T}
    found = read(save(tmp_path, 1, Saved({"optimizer": views}, {}))).tensors["optimizer"]
    assert all(torch.equal(found[name], views[name]) for name in views)


def test_saving_a_step_again_leaves_a_good_one_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    path = save(tmp_path, 3, saved(3))
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert save(tmp_path, 3, saved(3)) == path
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
    (path / "state.json").write_text("{}")
    save(tmp_path, 3, saved(3))
    assert equal(read(path), saved(3))


def test_every_flipped_bit_is_found_and_its_file_named(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1, saved(1))
    files = sorted(path.iterdir())
    places = [(file, bit) for file in files for bit in range(8 * file.stat().st_size)]
    chosen = random.Random(0).sample(places, 500)
    manifest = [(path / "MANIFEST.json", bit) for bit in range(0, 8 * (path / "MANIFEST.json").stat().st_size, 7)]
    for file, bit in [*chosen, *manifest]:
        content = bytearray(file.read_bytes())
        content[bit // 8] ^= 1 << (bit % 8)
        whole = file.read_bytes()
        file.write_bytes(content)
        fault = verify(path)
        assert fault is not None, (file.name, bit)
        assert fault.startswith("checkpoints/step-00000001/")
        if file.name != "MANIFEST.json":
            assert fault == f"checkpoints/step-00000001/{file.name}: sha256 differs from its manifest"
        file.write_bytes(whole)
    assert verify(path) is None


@pytest.mark.parametrize("name", ["MANIFEST.json", "adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer"])
def test_a_part_that_is_missing_or_torn_is_named_and_the_older_one_used(name: str, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    old, new = save(folder, 100, saved(100)), save(folder, 120, saved(120))
    content = (new / name).read_bytes()
    if damage == "missing":
        (new / name).unlink()
    else:
        (new / name).write_bytes({"empty": b"", "cut": content[:-1], "longer": content + b" "}[damage])
    found, wrong = newest(folder)
    assert found == old
    assert len(wrong) == 1
    assert wrong[0].startswith(f"checkpoints/step-00000120/{name}: ")
    if damage == "missing":
        assert wrong == [f"checkpoints/step-00000120/{name}: missing"]
    with pytest.raises(RefusedError, match=name.replace(".", r"\.")):
        read(new)


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '{"files": [], "step": 1}', '{"files": {"state.json": 1}, "step": 1}']
)
def test_a_manifest_that_is_other_json_is_a_fault_and_no_crash(text: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1, saved(1))
    (path / "MANIFEST.json").write_text(text)
    fault = verify(path)
    assert fault is not None
    assert "MANIFEST.json: not what was written" in fault


def test_where_nothing_verifies_every_fault_is_told_newest_first(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step, saved(step)) / "state.json").unlink()
    found, wrong = newest(tmp_path)
    assert found is None
    assert [text.split("/")[1] for text in wrong] == ["step-00000002", "step-00000001"]
    assert newest(tmp_path / "nothing") == (None, [])


def test_only_committed_folders_count_and_they_go_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100_000_000):
        save(tmp_path, step, saved(step))
    (tmp_path / ".staging-00000011-1").mkdir()
    (tmp_path / "step-00000012.old").mkdir()
    (tmp_path / "step-00000013").write_text("a file")
    assert names(tmp_path) == ["step-00000009", "step-00000010", "step-100000000"]


def record(step: int) -> StepRecord:
    return StepRecord(step, 1.0, 1e-4, 0.1, 5, 9, 1.0, 1.0, 1.0)


def hook(folder: Path, clock: dict[str, int], **options: Any) -> Checkpoints:
    return Checkpoints(folder, lambda: saved(clock["step"]), **{"every": 1, "keep": 2, "last": 6, **options})


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [5, 6]), (3, [3, 6]), (4, [4, 6]), (10, [6])])
def test_the_hook_saves_every_so_many_steps_and_the_last_and_keeps_so_many(
    every: int, steps: list[int], tmp_path: Path
) -> None:
    clock = {"step": 0}
    made = hook(tmp_path, clock, every=every)
    for step in range(1, 7):
        clock["step"] = step
        made.after_step(record(step))
    assert names(tmp_path) == [f"step-{step:08d}" for step in steps]
    for path in committed(tmp_path):
        assert equal(read(path), saved(int(path.name[5:]), best=None))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_by_name_before_a_file_is_written(value: float, tmp_path: Path) -> None:
    trained = {"q.adapter.A": torch.ones(2, 3), "q.adapter.B": torch.zeros(3, 2)}
    made = hook(tmp_path / "checkpoints", {"step": 5}, trained=trained)
    trained["q.adapter.B"][2, 1] = value
    for save_now in (lambda: made.after_step(record(5)), lambda: made.save(5)):
        with pytest.raises(NumericsError, match=r"^step 5: q\.adapter\.B is not finite"):
            save_now()
    assert not (tmp_path / "checkpoints").exists()
    trained["q.adapter.B"][2, 1] = 0.0
    assert verify(made.save(5)) is None


def test_an_ending_leaves_a_good_checkpoint_of_its_step_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    path = save(tmp_path, 3, saved(3))
    made = hook(tmp_path, {"step": 3})
    before = (path / "state.json").stat().st_mtime_ns
    assert made.save(3) == path
    assert (path / "state.json").stat().st_mtime_ns == before
    (path / "adapter.safetensors").unlink()
    assert verify(made.save(3)) is None


def test_the_course_of_a_run_replaces_a_checkpoint_that_tells_less(tmp_path: Path) -> None:
    """An evaluation that a signal broke off is made by the resume: its loss then belongs to that step's state."""
    save(tmp_path, 3, saved(3, held_out_loss=None))
    made = Checkpoints(tmp_path, lambda: saved(3, held_out_loss=2.0), every=1, keep=2, last=9)
    made.after_step(record(3))
    assert read(tmp_path / "step-00000003").state["best"] == {"step": 3, "loss": 2.0}


def test_files_that_a_state_tells_of_are_on_the_disk_before_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def renamed(one: Any, other: Any) -> None:
        done.append(f"rename {other}")
        rename(one, other)

    metrics, later = tmp_path / "metrics.jsonl", tmp_path / "later.jsonl"
    metrics.write_text("{}\n")
    made = hook(tmp_path / "checkpoints", {"step": 1}, beside=[metrics, later])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "rename", renamed)
        path = made.save(1)
    committed_at = done.index(f"rename {path}")
    assert str(metrics) in done[:committed_at]
    staged = {Path(name).name for name in done[:committed_at] if ".staging-" in name}
    assert {file.name for file in path.iterdir()} < staged  # and the folder itself
    assert str(path.parent) in done[committed_at:]


def test_what_a_crash_left_is_cleared_by_the_next_save(tmp_path: Path) -> None:
    stale = tmp_path / ".staging-00000001-999999"
    stale.mkdir()
    (stale / "adapter.safetensors").write_bytes(b"\0" * 100)
    save(tmp_path, 2, saved(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002"]


def test_the_module_never_unpickles() -> None:
    for module in (checkpoint, manifest, tensors):
        source = Path(module.__file__).read_text(encoding="utf-8")
        assert "torch.load" not in source
        assert "pickle" not in source.replace("unpickled", "")


def test_a_folder_of_another_machine_verifies(tmp_path: Path) -> None:
    path = save(tmp_path / "one", 4, saved(4))
    shutil.copytree(path, tmp_path / "two" / path.name)
    assert newest(tmp_path / "two") == (tmp_path / "two" / path.name, [])
