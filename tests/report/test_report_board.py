"""The board of a sweep: plain lines for programs, a table for people, and never a reason for a sweep to end."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from cli import ROOT
from screens import Terminal, terminal

from lowrank.report.board import Board
from lowrank.report.course import KEPT, Course, Curve


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")


def jobs(folder, count):
    return [(f"optim.lr=1e-{n}", folder / str(n)) for n in range(count)]


def write(folder, steps, last=40, loss=4.0, evaluated=None):
    folder.mkdir(exist_ok=True)
    (folder / "identity.json").write_text(json.dumps({"identity": {"steps": last}}))
    rows = [{"event": "step", "step": s, "loss": loss / s, "tokens_per_s": 4321.0} for s in range(1, steps + 1)]
    rows += [{"event": "eval", "step": steps, "loss": evaluated}] if evaluated else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_pipe_gets_a_line_for_each_start_and_end(tmp_path):
    stream = io.StringIO()
    board = Board(jobs(tmp_path, 4), stream)
    assert not board.live
    board.ended(0, "skipped")
    for place in (1, 2, 3):
        board.started(place)
    board.refresh()
    board.say("job 3 waits")
    board.ended(2, "failed", "exit 4")
    board.ended(1, "done")
    board.ended(3, "interrupted", "SIGINT")
    board.close()
    assert stream.getvalue().splitlines() == [
        f"[1/4] skipped (done already): optim.lr=1e-0 → {tmp_path}/0",
        f"[2/4] optim.lr=1e-1 → {tmp_path}/1",
        f"[3/4] optim.lr=1e-2 → {tmp_path}/2",
        f"[4/4] optim.lr=1e-3 → {tmp_path}/3",
        "job 3 waits",
        "[3/4] failed (exit 4)",
        "[2/4] done",
        "[4/4] interrupted (SIGINT)",
    ]


def drawn(tmp_path, columns, rows, count=100):
    """Of ``count`` jobs one is done, two run, one has failed."""
    with terminal(columns, rows) as tty:
        board = Board(jobs(tmp_path, count), tty.stream)
        for place in range(4):
            write(tmp_path / str(place), 10 + place, evaluated=1.25)
            board.started(place)
        board.ended(0, "done")
        board.ended(1, "failed", "exit 5")
        board.refresh()
        write(tmp_path / "3", 20)
        board.refresh()
        board.close()
        return Terminal(columns, rows).feed(tty.text).shown


def test_a_terminal_has_the_running_jobs_first_then_what_failed_and_what_has_no_room_is_counted(tmp_path):
    summary, *rows, rest = drawn(tmp_path, 120, 10)
    assert summary.startswith("1/100 done  2 running  1 failed  96 waiting")
    assert len(rows) + 2 <= 10 - 1
    assert [row.split()[:3] for row in rows[:4]] == [
        ["optim.lr=1e-2", "running", "12/40"],
        ["optim.lr=1e-3", "running", "20/40"],
        ["optim.lr=1e-1", "failed", "11/40"],
        ["optim.lr=1e-0", "done", "10/40"],
    ]
    assert "█" in rows[0]
    assert "▁" in rows[0]
    assert "4,321 tokens/s" in rows[0]
    assert "eval 1.250" in rows[0]
    assert rows[1].endswith(" left")
    assert "left" in summary
    assert "exit 5" in rows[2]
    waiting = sum("waiting" in row for row in rows)
    assert rest == f"… {96 - waiting} waiting"


@pytest.mark.parametrize(("columns", "rows"), [(40, 8), (20, 4), (200, 3), (64, 50)])
def test_the_table_fits_every_terminal(tmp_path, columns, rows):
    shown = drawn(tmp_path, columns, rows, count=30)
    assert len(shown) < rows
    assert all(len(line) < columns for line in shown)
    assert shown[0].startswith("1/30 done")


def test_no_torch_is_loaded_for_it():
    code = "import sys, lowrank.report.board; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_neither_a_closed_stream_nor_what_a_job_writes_nor_a_wrong_place_ends_a_sweep(tmp_path):
    with terminal(80, 20) as tty:
        board = Board(jobs(tmp_path, 5), tty.stream)
        for place, content in enumerate(
            (b"\xff\x00\n", b'{"event":"step","step":"x"}\n[]\n', b'{"step":1', b"[" * 10**5)
        ):
            (tmp_path / str(place)).mkdir()
            (tmp_path / str(place) / "metrics.jsonl").write_bytes(content)
            (tmp_path / str(place) / "identity.json").write_bytes(content)
            board.started(place)
        (tmp_path / "4" / "metrics.jsonl").mkdir(parents=True)
        board.started(4)
        board.refresh()
        board.ended(77, "done")
        board.ended(0, "no such status")
        board.refresh()
        tty.stream.close()
        board.refresh()
        board.close()
    closed = io.StringIO()
    closed.close()
    board = Board(jobs(tmp_path, 1), closed)
    board.started(0)
    board.ended(0, "done")
    board.close()


def test_a_course_reads_what_was_added_and_begins_anew_where_a_resumed_run_took_steps_back(tmp_path):
    course = Course(tmp_path)
    course.read()
    assert (course.step, course.left()) == (0, None)
    write(tmp_path, 3)
    course.read()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 4, "loss": 1.0}\n{"event": "step", "st')
    course.read()
    assert (course.step, course.last, len(course.curve.points)) == (4, 40, 4)
    assert course.left() is not None
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('ep": 5, "loss": 1.0}\n')
    course.read()
    assert course.step == 5
    write(tmp_path, 2)
    course.read()
    assert (course.step, len(course.curve.points)) == (2, 2)


def test_a_long_curve_keeps_its_shape_in_a_few_points():
    curve = Curve()
    for step in range(100_000):
        curve.add(float(step))
    assert KEPT // 2 <= len(curve.points) <= KEPT
    assert curve.points == sorted(curve.points)
    assert abs(curve.points[len(curve.points) // 2] - 50_000 * len(curve.points) * curve.stride / 100_000) < 1000
