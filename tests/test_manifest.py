"""A folder with a manifest appears whole or not at all, holds what it lists and nothing else, and leads nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank.manifest import MANIFEST, committing, faults, give_back, newest, remove, sealed, step_in, verify

FILES = {"a.txt": b"alpha", "b.bin": bytes(range(256)), "empty": b""}


def made(final: Path, files: dict[str, bytes] = FILES, **about: Any) -> Path:
    with committing(final, **about) as staging:
        for name, content in files.items():
            staging.write(name, [content[:2], content[2:]])
    return final


def test_what_is_written_by_us_and_by_others_is_listed_alike(tmp_path: Path) -> None:
    one = made(tmp_path / "one", step=3)
    with committing(tmp_path / "two", step=3) as staging:
        for name, content in FILES.items():
            (staging.folder / name).write_bytes(content)
    assert {path.name: path.read_bytes() for path in one.iterdir() if path.name != MANIFEST} == FILES
    assert (one / MANIFEST).read_bytes() == (tmp_path / "two" / MANIFEST).read_bytes()
    assert [verify(tmp_path / name) for name in ("one", "two")] == [None, None]
    assert step_in(one) == 3
    assert step_in(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_the_staging_folder_lies_beside_with_the_files_directly_in_it(tmp_path: Path) -> None:
    with committing(tmp_path / "checkpoints" / "step-00000007") as staging:
        staging.write("a", [b"1"])
        assert staging.folder.parent == tmp_path / "checkpoints"
        assert staging.folder.name.startswith(".staging-00000007-")
        assert [path.name for path in staging.folder.iterdir()] == ["a"]
        assert not (tmp_path / "checkpoints" / "step-00000007").exists()


@pytest.mark.parametrize("there", [False, True], ids=["new", "over-another"])
def test_an_exception_leaves_what_was_there_and_nothing_else(there: bool, tmp_path: Path) -> None:
    if there:
        made(tmp_path / "adapter", {"old": b"1"})
    with pytest.raises(TypeError):
        made(tmp_path / "adapter", {"new": b"2", "newer": None})  # type: ignore[dict-item]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"] * there
    assert not there or {path.name for path in (tmp_path / "adapter").iterdir()} == {"old", MANIFEST}


def test_another_one_is_replaced_whole_and_what_a_crash_left_goes(tmp_path: Path) -> None:
    made(tmp_path / "adapter", {"old": b"1"})
    for left in (".staging-adapter-1", ".staging-adapter-1-old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_bytes(b"3")
    (tmp_path / ".staging-merged-1").mkdir()  # somebody else's
    made(tmp_path / "adapter", {"new": b"2"})
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [MANIFEST, "new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".staging-merged-1", "adapter"]


def test_a_checkpoint_that_a_crash_caught_aside_has_its_name_back_where_no_other_took_it(tmp_path: Path) -> None:
    for step, aside in ((3, "old"), (4, "gone"), (5, "old"), (6, "old")):
        made(tmp_path / f"step-{step}", step=step).rename(tmp_path / f".staging-{step}-17-{aside}")
    made(tmp_path / "step-5", {"new": b"2"})
    (tmp_path / ".staging-6-17-old" / "a.txt").unlink()
    assert give_back(tmp_path) == [tmp_path / "step-3"]
    assert verify(tmp_path / "step-3") is None
    assert verify(tmp_path / "step-5") is None
    assert not (tmp_path / "step-4").exists()
    assert not (tmp_path / "step-6").exists()
    assert give_back(tmp_path) == give_back(tmp_path / "not there") == []


def test_where_the_new_one_cannot_take_the_name_the_old_one_has_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "adapter", {"old": b"1"})
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if (path / "new").exists():
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        made(tmp_path / "adapter", {"new": b"2"})
    assert verify(tmp_path / "adapter") is None
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "old").read_bytes() == b"1"


def forge(folder: Path, files: Any) -> None:
    """A manifest that is sealed as ours are: of somebody who knows how."""
    (folder / MANIFEST).write_bytes(sealed({"step": 1, "files": files}))


def extra(folder: Path) -> None:
    (folder / "more.py").write_text("print('hello')")


def extra_folder(folder: Path) -> None:
    (folder / "sub").mkdir()


def link(folder: Path) -> None:
    (folder.parent / "elsewhere").write_bytes((folder / "a.txt").read_bytes())
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(folder.parent / "elsewhere")


def link_inside(folder: Path) -> None:
    (folder / "a.txt").rename(folder / "c.txt")
    (folder / "a.txt").symlink_to("c.txt")


def dangling(folder: Path) -> None:
    (folder / "more").symlink_to("/nowhere")


def pipe(folder: Path) -> None:
    (folder / "b.bin").unlink()
    os.mkfifo(folder / "b.bin")


def folder_for_file(folder: Path) -> None:
    (folder / "b.bin").unlink()
    (folder / "b.bin").mkdir()


def manifest_link(folder: Path) -> None:
    (folder / MANIFEST).rename(folder.parent / "m")
    (folder / MANIFEST).symlink_to(folder.parent / "m")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file more": (extra, "more.py: not in the manifest"),
    "a folder more": (extra_folder, "sub: not in the manifest"),
    "a link out": (link, "a.txt: a link"),
    "a link within": (link_inside, "a.txt: a link"),
    "a dangling link": (dangling, "more: a link"),
    "a pipe": (pipe, "b.bin: cannot be read (not a file)"),
    "a folder for a file": (folder_for_file, "b.bin: cannot be read (not a file)"),
    "a linked manifest": (manifest_link, f"{MANIFEST}: not what was written"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_what_is_not_a_plain_file_of_the_manifest_is_a_fault(
    change: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    folder = made(tmp_path / "checkpoints" / "step-00000001", step=1)
    change(folder)
    assert verify(folder) == f"checkpoints/step-00000001/{said}"
    assert newest(folder.parent) == (None, [f"checkpoints/step-00000001/{said}"])


def test_a_linked_checkpoint_is_a_fault(tmp_path: Path) -> None:
    real = made(tmp_path / "elsewhere" / "step-00000001")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001").symlink_to(real)
    assert newest(tmp_path / "checkpoints") == (None, ["checkpoints/step-00000001: a link, not a folder"])
    remove([tmp_path / "checkpoints" / "step-00000001"])
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert verify(real) is None


@pytest.mark.parametrize(
    "name", ["../elsewhere", "/etc/passwd", "sub/a.txt", "..", ".", "", "sub\\a", "a\0b", MANIFEST, "../step-1/a.txt"]
)
def test_a_name_that_is_no_plain_files_is_refused_unread(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "step-1")
    (tmp_path / "elsewhere").write_bytes(b"")
    empty = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    forge(folder, {name: empty})
    assert verify(folder) == f"{tmp_path.name}/step-1/{MANIFEST}: not what was written"


@pytest.mark.parametrize("files", [[], "a.txt", {"a.txt": 3}, {"a.txt": {"bytes": 1}}, {"a.txt": {"x": 1}}, None])
def test_a_sealed_manifest_of_another_form_is_a_fault_and_no_crash(files: Any, tmp_path: Path) -> None:
    folder = made(tmp_path / "step-1")
    forge(folder, files)
    assert verify(folder) == f"{tmp_path.name}/step-1/{MANIFEST}: not what was written"


@pytest.mark.parametrize(
    "raw", [b"[" * 200_000, b'{"files": {}}' + b" " * (16 << 20), b"\xff", b"9" * 5000, b""], ids=len
)
def test_a_manifest_of_any_size_and_depth_costs_little(raw: bytes, tmp_path: Path) -> None:
    folder = made(tmp_path / "step-1")
    (folder / MANIFEST).write_bytes(raw)
    assert verify(folder) == f"{tmp_path.name}/step-1/{MANIFEST}: not what was written"


def test_a_file_of_another_size_is_not_read(tmp_path: Path) -> None:
    folder = made(tmp_path / "step-1")
    with (folder / "empty").open("wb") as file:
        file.truncate(1 << 40)  # a hole of a terabyte
    assert verify(folder) == f"{tmp_path.name}/step-1/empty: sha256 differs from its manifest"


def test_every_fault_is_told_and_no_control_character_with_it(tmp_path: Path) -> None:
    folder = made(tmp_path / "adapter")
    (folder / "a.txt").write_bytes(b"alphA")
    (folder / "b.bin").unlink()
    (folder / "\x1b[31m").write_bytes(b"")
    assert list(faults(folder)) == [
        "adapter/'\\x1b[31m': not in the manifest",
        "adapter/a.txt: sha256 differs from its manifest",
        "adapter/b.bin: missing",
    ]


def test_verifying_imports_no_torch() -> None:
    code = "import sys, lowrank.manifest, lowrank.record.verify; print([m for m in ('torch', 'numpy', 'transformers') "
    found = subprocess.run([sys.executable, "-c", f"{code}if m in sys.modules])"], capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr


def test_a_manifest_is_json_that_others_can_check(tmp_path: Path) -> None:
    found = json.loads((made(tmp_path / "one", step=3) / MANIFEST).read_bytes())
    assert found["files"]["a.txt"] == {
        "bytes": 5,
        "sha256": "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f8",
    }
