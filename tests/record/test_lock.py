"""One process owns a run directory: real processes, which import no torch and so start at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cli import ROOT, environment

from lowrank.errors import RefusedError
from lowrank.record import lock
from lowrank.record.lock import LOCK, OWNER, Process, owned

CONTEND = """
import os, sys, time
from pathlib import Path
folder, inside, rounds, how = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
from lowrank.record import lock
from lowrank.errors import RefusedError
if how == "file":
    import errno, fcntl
    def flock(*_): raise OSError(errno.ENOLCK, "no locks here")
    fcntl.flock = flock
won = 0
for number in range(rounds):
    try:
        with lock.owned(folder):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another one is inside
            if number % 2:  # leave something, so that the directory stays
                (folder / "metrics.jsonl").touch()
            time.sleep(0.002)
            os.unlink(inside)
            won += 1
    except RefusedError as error:
        assert "in use by process " in str(error), error
        time.sleep(0.001)
print(won)
"""
HOLD = """
import os, sys, time
from pathlib import Path
from lowrank.record import lock
with lock.owned(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "metrics.jsonl").touch()
    child = 0
    exec(sys.argv[2])
    print(child, flush=True)
    time.sleep(60)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )


@contextmanager
def holding(folder: Path, act: str = "pass") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that owns the directory, and the number of the child that ``act`` has started in it, or 0."""
    process, child = start(HOLD, folder, act), 0
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        yield process, child
    finally:
        process.kill()
        if child:
            os.kill(child, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file system answers that has no locks."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("how", ["kernel", "file"])
def test_of_eight_processes_one_at_a_time_is_inside(tmp_path: Path, how: str) -> None:
    racing = [start(CONTEND, tmp_path / "a/run", tmp_path / "inside", 50, how) for _ in range(8)]
    told = [process.communicate(timeout=60) for process in racing]
    assert [process.returncode for process in racing] == [0] * 8, [err for _, err in told]
    assert sum(int(out) for out, _ in told) > 8
    assert {path.name for path in (tmp_path / "a/run").iterdir()} - {LOCK} == {"metrics.jsonl"}


def test_the_owners_number_is_in_the_refusal_which_changes_nothing(tmp_path: Path) -> None:
    with holding(tmp_path / "run") as (process, _):
        before = (tmp_path / "run" / LOCK).read_bytes()
        with (
            pytest.raises(RefusedError, match=f"run: in use by process {process.pid}\\.$") as error,
            owned(tmp_path / "run"),
        ):
            pass
        assert error.value.exit_code == 6
        assert (tmp_path / "run" / LOCK).read_bytes() == before


def test_a_process_that_was_killed_keeps_no_lock(tmp_path: Path) -> None:
    with holding(tmp_path / "run") as (process, _):
        process.send_signal(signal.SIGKILL)
        process.wait()
        with owned(tmp_path / "run"):
            assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()


def test_this_process_owns_it_once(tmp_path: Path) -> None:
    with owned(tmp_path / "run"):
        with pytest.raises(RefusedError, match=f"in use by process {os.getpid()}"), owned(tmp_path / "run"):
            pass
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()


FORK = "child = os.fork()\nif not child: os.close(1); os.close(2); time.sleep(30); os._exit(0)"
SPAWN = "from subprocess import *; child = Popen(['sleep', '30'], stdout=DEVNULL, stderr=DEVNULL).pid"
LEAVE = "pid = os.fork()\nif not pid: sys.exit()\nos.waitpid(pid, 0)"


@pytest.mark.parametrize("act", [FORK, SPAWN], ids=["forked", "spawned"])
def test_a_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path: Path, act: str) -> None:
    with holding(tmp_path / "run", act) as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        with owned(tmp_path / "run"):
            pass


def test_a_forked_child_that_leaves_undoes_nothing(tmp_path: Path) -> None:
    with holding(tmp_path / "run", LEAVE), pytest.raises(RefusedError), owned(tmp_path / "run"):
        pass


def test_a_waiting_descriptor_of_a_removed_lock_file_owns_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with owned(folder):
        old = os.open(folder / LOCK, os.O_RDWR)  # another one has opened it and is about to lock
    with owned(folder):
        fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it gets the lock of a file that nobody will open again
        assert os.fstat(old).st_ino != (folder / LOCK).stat().st_ino or os.fstat(old).st_nlink == 0
        with pytest.raises(RefusedError), owned(folder):
            pass
    os.close(old)


def test_a_lock_file_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("content")
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(RefusedError, match="a link"), owned(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "content"


def test_a_file_in_the_directorys_place_is_the_machines_refusal(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError), owned(tmp_path / "run"):
        pass


def test_another_error_of_the_lock_is_no_missing_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken"), owned(tmp_path / "run"):
        pass
    assert not lock.held


# Without flock


@pytest.mark.usefixtures("without_flock")
def test_without_locks_a_file_names_the_owner_and_goes_with_it(tmp_path: Path) -> None:
    with owned(tmp_path / "run"):
        assert Process.of((tmp_path / "run" / OWNER).read_text()) == Process.this()
        with pytest.raises(RefusedError, match=f"in use by process {os.getpid()}. This file"), owned(tmp_path / "run"):
            pass
        (tmp_path / "run/metrics.jsonl").touch()
    assert not (tmp_path / "run" / OWNER).exists()


def ended() -> Process:
    process = subprocess.Popen(["sleep", "60"])
    known = replace(Process.this(), process=process.pid, started=lock.start(process.pid))
    process.kill()
    process.wait()
    return known


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize(
    ("left", "recovered"),
    [
        (lambda: ended(), True),
        (lambda: replace(Process.this(), process=1), True),  # its number is another's by now
        (lambda: replace(ended(), started="another-boot/1/2", machine="m"), False),
        (lambda: replace(Process.this(), process=2**22 + 1, started="another-boot/1/2"), True),
        (lambda: replace(ended(), host="elsewhere"), False),
        (lambda: replace(ended(), started=""), False),
        (lambda: replace(ended(), started=lock.start(os.getpid()).replace("/4026", "/1026")), False),  # a container's
    ],
    ids=["ended", "number used again", "other machine", "rebooted", "other host", "unknown start", "other namespace"],
)
def test_a_file_left_behind_goes_only_where_its_process_is_seen_to_be_gone(
    tmp_path: Path, left: object, recovered: bool
) -> None:
    assert callable(left)
    owner: Process = left()
    if owner.started.startswith("another-boot") and not owner.machine:
        pytest.skip("this machine has no number of its own")
    (tmp_path / OWNER).write_text(owner.text)
    if recovered:
        with owned(tmp_path):
            assert Process.of((tmp_path / OWNER).read_text()) == Process.this()
        return
    where = f" on {owner.host}" if not owner.here else ""
    with (
        pytest.raises(RefusedError, match=f"in use by process {owner.process}{where}.*delete .*{OWNER}"),
        owned(tmp_path),
    ):
        pass
    assert (tmp_path / OWNER).read_text() == owner.text


@pytest.mark.usefixtures("without_flock")
def test_a_torn_owners_file_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text('{"process": 12')
    started = time.monotonic()
    with pytest.raises(RefusedError, match="in use by an unknown process"), owned(tmp_path):
        pass
    assert time.monotonic() - started < 5
