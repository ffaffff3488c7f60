"""The live view of a run: on a terminal, whole whatever happens; what others print there stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from cli import ROOT, SMALL, environment, write_rows
from screens import Terminal, terminal

from lowrank.session import live
from lowrank.train.hooks import StepRecord
from lowrank.train.progress import Lines, Progress, Standing


@pytest.fixture(autouse=True)
def kind(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(live, "PAUSE", 0.0)


def record(step, loss=2.0, memory=300.0):
    return StepRecord(
        step=step,
        loss=loss,
        lr=1e-4,
        grad_norm=0.5,
        target_tokens=10,
        real_tokens=100,
        tokens_per_s=1234.0,
        peak_memory_mb=memory,
        seconds=2.0,
    )


def view(tty, monkeypatch, asked=lambda: False):
    monkeypatch.setattr(sys, "stderr", tty.stream)
    return live.view(0, 10, 512.0, asked)


def shown(tty, columns=100, rows=30):
    return Terminal(columns, rows).feed(tty.text).shown


def test_it_shows_the_curve_the_speed_memory_against_the_ledger_the_time_left_and_the_last_evaluation(monkeypatch):
    with terminal() as tty:
        seen = view(tty, monkeypatch)
        for step in range(1, 5):
            seen.show(Standing(record(step, 5.0 - step), 0, 10, 75.0, 2, (4, 1.5), (3,), 2))
        head, *rest = shown(tty)
    text = "   ".join(rest)
    assert head.startswith("step 4/10 ━")
    assert head.endswith("─ 1:15 left + 2 evaluations")
    for part in ("loss 1.0000 █▆▃▁", "1,234 tokens/s", "300 MB of 512 predicted", "eval 1.5000 at step 4", "2 skipped"):
        assert part in text
    assert "1 spike, the last at step 3" in text


def test_at_the_end_one_plain_line_stays_of_it_and_the_streams_are_those_of_before(monkeypatch):
    with terminal() as tty:
        progress = Progress(0, 10, view(tty, monkeypatch), lambda text: None)
        for step in range(1, 11):
            progress.after_step(record(step))
        progress.close()
        assert sys.stderr is tty.stream
        [line] = shown(tty)
    assert line.startswith("step 10/10  loss 2.0000")


def test_what_others_print_stays_above_it_in_whole_lines(monkeypatch):
    with terminal() as tty:
        seen = view(tty, monkeypatch)
        standing = Standing(record(1), 0, 10, 1.0, 0, None, (), 0)
        seen.show(standing)
        print("a warn", end="", file=sys.stderr)
        seen.show(standing)
        print("ing\n 10 %\r 20 %\rall", file=sys.stderr)
        seen.say("This batch is skipped.")
        print("begun", end="", file=sys.stderr)
        seen.close()
        lines = shown(tty)
    assert lines[:3] == ["a warning", "all", "This batch is skipped."]
    assert lines[3] == "begun"
    assert len(lines) == 5


def test_after_a_signal_what_its_handler_wrote_below_is_left_alone(monkeypatch):
    asked = []
    with terminal() as tty:
        seen = view(tty, monkeypatch, lambda: bool(asked))
        standing = Standing(record(1), 0, 10, 1.0, 0, None, (), 0)
        seen.show(standing)
        asked.append(signal.SIGINT)
        os.write(tty.stream.fileno(), b"stopping after this step\n")
        seen.show(standing)
        seen.close()
        lines = shown(tty)
    assert lines[-2] == "stopping after this step"
    assert lines[-1].startswith("step 1/10  loss")


@pytest.mark.parametrize("columns", [12, 40, 80])
def test_a_narrow_terminal_gets_more_rows_and_no_line_that_wraps(columns, monkeypatch):
    with terminal(columns) as tty:
        seen = view(tty, monkeypatch)
        for step in (1, 2):
            seen.show(Standing(record(step), 0, 10, 75.0, 0, (2, 1.5), (), 0))
        lines = shown(tty, columns)
    assert all(len(line) < columns for line in lines)
    assert len([line for line in lines if line.startswith("step")]) == 1


def test_a_pipe_gets_lines(monkeypatch):
    assert isinstance(live.view(0, 10, None, lambda: False), Lines)


def test_a_run_on_a_terminal_that_is_interrupted_leaves_it_whole(tmp_path):
    rows = write_rows(tmp_path / "my.jsonl")
    given = ["model=tiny_llama", f"data.path={rows}", "loop.steps=100000", f"hydra.run.dir={tmp_path}/run"]
    with terminal(90, 30) as tty:
        end = tty.stream.fileno()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *SMALL, *given],
            **{"stdin": end, "stdout": end, "stderr": end, "cwd": ROOT, "start_new_session": True},
            env=environment(TERM="xterm", NO_COLOR="1"),
        )
        until = time.monotonic() + 120
        while time.monotonic() < until and b"of " not in tty.seen and process.poll() is None:
            time.sleep(0.05)
        while time.monotonic() < until and tty.seen.count(b"tokens/s") < 3 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        text = tty.text
    lines = Terminal(90, 30).feed(text).shown
    assert "predicted" in text
    assert "▁" in text
    assert any(line.startswith("stopping after this step") for line in lines)
    assert any(line.startswith("interrupted after step") for line in lines)
    assert sum("/100000  loss" in line for line in lines) == 1
