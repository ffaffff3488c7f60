"""What a signal does depends on the moment, and a wall-clock budget leaves after a whole step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from loops import loop_of
from transformers import LlamaForCausalLM

from lowrank.train.deadline import Deadline
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.stopping import SIGNALS, Stopping


class Leaves:
    stop = False


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def stopping() -> Iterator[Stopping]:
    with Stopping().installed() as stopping:
        yield stopping


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_at_once_and_the_next_one_ends_the_process(
    number: signal.Signals, stopping: Stopping
) -> None:
    with pytest.raises(KeyboardInterrupt):
        send(number)
    assert [signal.getsignal(each) for each in SIGNALS] == [signal.SIG_DFL] * 3
    with pytest.raises(KeyboardInterrupt):  # should somebody's code have swallowed it
        stopping.check()


@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_loop_it_asks_for_the_steps_end(
    number: signal.Signals, stopping: Stopping, capfd: pytest.CaptureFixture[str]
) -> None:
    loop = Leaves()
    with stopping.after_step(loop):
        send(number)
        assert loop.stop
    assert capfd.readouterr().err == "stopping after this step; once more ends at once\n"
    assert [signal.getsignal(each) for each in SIGNALS] == [signal.SIG_DFL] * 3


def test_what_is_held_is_finished_and_the_signal_is_not_forgotten(stopping: Stopping) -> None:
    loop = Leaves()
    with stopping.held():
        send()
    with stopping.after_step(loop):
        assert loop.stop
    with pytest.raises(KeyboardInterrupt), stopping.at_once():
        pytest.fail("entered")


def test_inside_the_loop_an_evaluation_is_broken_off(stopping: Stopping) -> None:
    loop = Leaves()
    with stopping.after_step(loop):
        with pytest.raises(KeyboardInterrupt), stopping.at_once():
            send()
        assert not loop.stop


def test_a_signal_before_the_evaluation_leaves_it_out(stopping: Stopping) -> None:
    with stopping.after_step(Leaves()):
        send()
        with pytest.raises(KeyboardInterrupt), stopping.at_once():
            pytest.fail("entered")


def test_the_handlers_that_were_there_come_back() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt), Stopping().installed():
        send()
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_thread_installs_nothing() -> None:
    before, inside = [signal.getsignal(each) for each in SIGNALS], []

    def run() -> None:
        with Stopping().installed():
            inside.extend(signal.getsignal(each) for each in SIGNALS)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == before == [signal.getsignal(each) for each in SIGNALS]


def test_a_hang_up_that_is_to_be_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopping().installed() as stopping:
            send(signal.SIGHUP)
            assert not stopping.asked
            with pytest.raises(KeyboardInterrupt):
                send()
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("seconds", "steps"), [(1e-9, 1), (3600.0, 3), (None, 3)])
def test_a_budget_leaves_after_a_whole_step_and_not_before_the_first(
    seconds: float | None, steps: int, llama: LlamaForCausalLM
) -> None:
    loop = loop_of(llama)
    deadline = Deadline(loop, seconds)
    loop.hooks = [deadline]
    loop.run(3)
    assert (loop.state.step, deadline.passed) == (steps, steps == 1)


def test_what_the_other_hooks_do_counts(llama: LlamaForCausalLM) -> None:
    loop = loop_of(llama)

    class Evaluates(Hook):
        def after_step(self, record: StepRecord) -> None:
            if record.step == 2:
                deadline.started -= 3600  # as an hour's evaluation would

    deadline = Deadline(loop, 3600.0)
    loop.hooks = [Evaluates(), deadline]
    loop.run(5)
    assert loop.state.step == 2
