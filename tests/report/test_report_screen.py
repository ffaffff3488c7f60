"""Lines redrawn in place: whole after a resize, in between other output, and whatever ends the process."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from cli import ROOT
from screens import Terminal, terminal

from lowrank.report.screen import BARS, PLAIN_BARS, Screen, bars, clock, drawable, fit, width


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_drawing_takes_the_place_of_the_one_before_and_what_is_printed_above_stays():
    with terminal(40, 10) as tty:
        screen = Screen(tty.stream)
        screen.draw([[("one", "")], [("two", "bold")]])
        screen.above("said\n")
        screen.draw([[("three", "")]])
        assert Terminal(40, 10).feed(tty.text).shown == ["said", "three"]


def test_a_line_never_wraps_and_a_drawing_is_never_higher_than_the_terminal():
    with terminal(20, 5) as tty:
        screen = Screen(tty.stream)
        for n in range(3):
            screen.draw([[("x" * 15, ""), (f"{n}" * 15, "")] for _ in range(9)])
        shown = Terminal(20, 5).feed(tty.text).shown
    assert shown == ["xxxxxxxxxxxxxxx222…"] * 4


def test_after_the_terminal_has_become_narrower_nothing_of_the_old_drawing_is_left():
    with terminal(40, 12) as tty:
        screen = Screen(tty.stream)
        screen.draw([[("a" * 35, "")], [("b" * 10, "")]])
        tty.stream.flush()
        tty.size(16, 12)
        screen.draw([[("c" * 35, "")]])
        first, second = tty.text.split("\x1b[?2026l")[:2]
    seen = Terminal(40, 12).feed(first)
    seen.resize(16)
    assert seen.feed(second).shown == ["c" * 14 + "…"]


@pytest.mark.parametrize(("value", "colours"), [(None, True), ("", True), ("1", False)])
def test_no_color_is_respected(value, colours, monkeypatch):
    if value is not None:
        monkeypatch.setenv("NO_COLOR", value)
    with terminal() as tty:
        Screen(tty.stream).draw([[("red", "red")]])
        assert ("\x1b[31m" in tty.text) is colours


def test_text_that_is_shown_is_not_obeyed_and_keeps_to_its_row():
    [(text, _)] = fit([("a\x1b[2J\nb\tc", "")], 40)
    assert text == "a\ufffd[2J b c"
    assert width(fit([("日本語日本語", "")], 7)) <= 7


def test_a_pipe_a_dumb_terminal_and_a_closed_stream_are_not_drawn_on(monkeypatch):
    assert not drawable(io.StringIO())
    with terminal() as tty:
        assert drawable(tty.stream)
        monkeypatch.setenv("TERM", "dumb")
        assert not drawable(tty.stream)
        tty.stream.close()
        assert not drawable(tty.stream)


BACKGROUND = """
import fcntl, subprocess, sys, termios
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
ask = "import sys; from lowrank.report.screen import drawable; print(drawable(sys.stderr), flush=True)"
for group in (None, 0):
    subprocess.run([sys.executable, "-c", ask], process_group=group, check=True)
"""


def test_of_several_processes_on_one_terminal_the_one_in_front_draws():
    with terminal() as tty:
        end = tty.stream.fileno()
        done = subprocess.run(
            [sys.executable, "-c", BACKGROUND],
            **{"stdin": end, "stderr": end, "stdout": subprocess.PIPE, "text": True},
            **{"start_new_session": True, "check": True, "cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}},
        )
    assert done.stdout.split() == ["True", "False"]


def test_bars_rise_with_the_values_keep_to_their_width_and_to_what_the_stream_can_write():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    assert bars(range(8), 8, stream) == BARS
    assert bars(range(800), 8, stream) == BARS
    assert bars([3.0, float("nan")], 8, stream)[1] == bars([3.0, 3.0], 8, stream)[1]
    assert bars([], 8, stream) == ""
    assert set(bars(range(100), 12, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))) == set(PLAIN_BARS)


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (64.6, "1:05"), (3845, "1:04:05")])
def test_a_time_is_read_as_on_a_clock(seconds, shown):
    assert clock(seconds) == shown
