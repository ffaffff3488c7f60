"""Files of others: in their folder, of a bounded size and depth, and JSON as the standard has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowrank import foreign
from lowrank.errors import RefusedError

REFUSED = {
    "not an object": b"[]",
    "nothing": b"",
    "cut short": b'{"a": 1',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a name twice": b'{"a": 1, "a": 2}',
    "a name twice inside": b'{"a": [{"b": 1, "b": 2}]}',
    "no number": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "beyond a double": b'{"a": 1e400}',
    "beyond 64 bits": b'{"a": 9223372036854775808}',
    "ten thousand digits": b'{"a": ' + b"1" * 10_000 + b"}",
    "half a character": b'{"a": ["\\ud800"]}',
    "half a character in a name": b'{"\\udfff": 1}',
    "deep": b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}",
    "deeper than the stack": b'{"a":' * 100_000,
    "two values": b"{} {}",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_json_of_ours_is_refused_with_the_file_s_name(case: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(REFUSED[case])
    with pytest.raises(RefusedError, match=r"a\.json: cannot be read: "):
        foreign.read_json(tmp_path, "a.json")


def test_plain_json_is_read_as_it_is(tmp_path: Path) -> None:
    text = '{"a": [1, -2.5e3, true, null, "é🙂", {"b": {}}], "n": 9223372036854775807, "m": -9223372036854775808}'
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert foreign.read_json(tmp_path, "a.json") == {
        "a": [1, -2500.0, True, None, "é🙂", {"b": {}}],
        "n": 2**63 - 1,
        "m": -(2**63),
    }


def test_a_file_too_large_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**40)  # no block of it is on the disk
    with pytest.raises(RefusedError, match=r"a\.json: cannot be read: larger than 67,108,864 bytes"):
        foreign.read_json(tmp_path, "a.json")


def test_a_link_may_stay_in_its_folder_and_lead_no_further(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside.json"
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    outside.write_text("{}")
    os.symlink("a.json", folder / "link.json")
    assert foreign.inside(folder, "link.json") == folder / "a.json"
    os.symlink(outside, folder / "absolute.json")
    os.symlink("../outside.json", folder / "up.json")
    os.symlink("up.json", folder / "twice.json")
    os.symlink("loop.json", folder / "loop.json")
    for name in ("absolute.json", "up.json", "twice.json", "../outside.json", str(outside)):
        with pytest.raises(RefusedError, match="leads out of its folder"):
            foreign.inside(folder, name)
    with pytest.raises(RefusedError, match="cannot be read"):
        foreign.inside(folder, "loop.json")


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.json").write_text('{"a": 1}')
    os.symlink("real", tmp_path / "link")
    assert foreign.read_json(tmp_path / "link", "a.json") == {"a": 1}


def test_a_snapshot_of_the_hub_s_cache_may_lead_to_the_blobs_beside_it_alone(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f2e", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "3c4d").write_text('{"a": 1}')
    (tmp_path / "models--a--b" / "other").write_text("{}")
    os.symlink("../../blobs/3c4d", snapshot / "a.json")
    os.symlink("../../other", snapshot / "b.json")
    assert foreign.read_json(snapshot, "a.json") == {"a": 1}
    with pytest.raises(RefusedError, match="leads out of its folder"):
        foreign.read_json(snapshot, "b.json")


def test_a_pipe_or_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json"):
        with pytest.raises(RefusedError, match="not a file"):
            foreign.read_json(tmp_path, name)
