"""What is told of a run as it goes: when a line is printed, what it counts, and how the time left is found."""

from __future__ import annotations

import time

import pytest

from lowrank.train.finite import Fault
from lowrank.train.hooks import StepRecord
from lowrank.train.progress import Lines, Pace, Progress


def record(step, spike=False):
    return StepRecord(
        step=step,
        loss=2.0,
        lr=1e-4,
        grad_norm=0.5,
        target_tokens=10,
        real_tokens=100,
        tokens_per_s=50.0,
        peak_memory_mb=300.0,
        seconds=2.0,
        spike=spike,
    )


class Seen:
    """A view that keeps what it is told."""

    def __init__(self):
        self.standings, self.said, self.judged, self.closed = [], [], 0, False

    def show(self, standing):
        self.standings.append(standing)

    def judging(self):
        self.judged += 1

    def say(self, text):
        self.said.append(text)

    def close(self):
        self.closed = True


def test_a_pipe_gets_twenty_lines_of_a_run_its_first_step_its_last_and_every_spike(capsys):
    progress = Progress(100, 1100, Lines(100, 1100), lambda text: None, held_out={200: 1.5}.get)
    for step in range(101, 1101):
        progress.after_step(record(step, spike=step == 333))
    progress.close()
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == ""
    assert "\x1b" not in said.err
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [101, *sorted([333, *range(150, 1101, 50)])]
    assert ["spike" in line for line in lines].count(True) == 1
    assert "eval" not in lines[1]
    assert "eval 1.5000" in lines[2]
    assert lines[-1] == (
        "step 1100/1100  loss 2.0000  eval 1.5000  lr 1.00e-04  norm 0.500  50 tokens/s  300 MB  0:00 left"
    )


def test_a_view_is_told_of_spikes_of_batches_passed_over_and_of_the_newest_evaluation():
    view, noted = Seen(), []
    progress = Progress(0, 5, view, noted.append, every=2, held_out={2: 3.5}.get)
    progress.after_step(record(1, spike=True))
    with progress.judging():
        pass
    progress.after_step(record(2))
    progress.after_skip(Fault(3, "loss is nan", (4, 5)))
    progress.after_step(record(3))
    progress.close()
    first, second, third = view.standings
    assert (first.judged, first.unmeasured) == (None, 3)  # at 2, at 4, and after the last
    assert (second.judged, second.unmeasured) == ((2, 3.5), 0)
    assert (third.spikes, third.skipped, third.judged) == ((1,), 1, (2, 3.5))
    assert view.said == noted == ["step 3: loss is nan (rows 4–5). This batch is skipped."]
    assert (view.judged, view.closed) == (1, True)


@pytest.mark.parametrize(
    ("last", "every", "step", "waiting"),
    [(10, 0, 3, 1), (10, 0, 10, 0), (10, 4, 3, 3), (10, 4, 8, 1), (10, 5, 3, 2), (10, 5, 10, 0), (10, 20, 3, 1)],
)
def test_evaluations_that_wait_are_the_periodic_ones_and_the_last_steps(last, every, step, waiting):
    assert Pace(last, every).waiting(step) == waiting


def test_the_time_left_counts_evaluations_apart_from_steps_and_leaves_the_first_step_out():
    pace = Pace(100, 10)
    time.sleep(0.2)  # compiles
    for step in range(1, 21):
        time.sleep(0.002)
        if step % 10 == 0:
            with pace.judging():
                time.sleep(0.1)
        pace.step()
    steps, evaluations = sum(pace.steps) / len(pace.steps), sum(pace.evaluations) / 2
    assert len(pace.steps) == 19
    assert steps < 0.1 < evaluations + 0.001
    assert pace.left(20) == pytest.approx(80 * steps + 8 * evaluations)
    assert pace.left(100) == 0
