"""Batches made a step ahead: the same numbers, and a thread that is gone afterwards."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from loops import loop_of, order_of, values

from lowrank.data.pack import Batch
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.loop import Loop
from lowrank.train.prefetch import Ahead, ahead


class Recorder(Hook):
    """What the loop tells of each step, and the threads that are there after it."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, float]] = []
        self.threads: set[str] = set()

    def after_step(self, record: StepRecord) -> None:
        self.rows.append((record.step, record.loss, record.grad_norm))
        self.threads |= {thread.name for thread in threading.enumerate()}


class Order:
    """An order that notes who asks, and fails at a step."""

    def __init__(self, fails: int | None = None) -> None:
        self.order, self.fails = order_of(), fails
        self.asked: list[tuple[int, str]] = []

    def at(self, step: int) -> list[Batch]:
        self.asked.append((step, threading.current_thread().name))
        if step == self.fails:
            raise ZeroDivisionError(f"no batch {step}")
        return self.order.at(step)


def batching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def trained(llama: Any, **changes: Any) -> tuple[Loop, Recorder]:
    recorder = Recorder()
    return loop_of(llama, hooks=[recorder], dropout=0.2, **changes), recorder


def test_every_number_is_the_same_with_and_without(make_llama: Any) -> None:
    loop, recorder = trained(make_llama())
    loop.run(5)
    plain, one_by_one = trained(make_llama())
    while plain.state.step < 5:
        record = plain.step()
        assert record is not None
        one_by_one.after_step(record)
    assert recorder.rows == one_by_one.rows
    assert loop.state.data_order == plain.state.data_order
    for name, value in values(plain).items():
        assert torch.equal(values(loop)[name], value), name


def test_each_steps_batches_are_made_once_in_one_thread_and_no_more_than_one_ahead(llama: Any) -> None:
    order = Order()
    loop, recorder = trained(llama, order=order)
    loop.run(4)
    assert [step for step, _ in order.asked][:4] == [1, 2, 3, 4]
    assert {step for step, _ in order.asked[4:]} <= {5}
    assert len({name for _, name in order.asked}) == 1
    assert any(name.startswith("batches") for name in recorder.threads)


def test_the_thread_ends_with_the_run_and_the_loop_has_its_own_batches_again(llama: Any) -> None:
    order = Order()
    loop, _ = trained(llama, order=order)
    loop.run(2)
    assert batching() == []
    assert loop.batches is order


@pytest.mark.parametrize("fails", [1, 3])
def test_what_making_a_batch_raises_comes_up_at_its_step_with_the_place_where_it_was_raised(
    fails: int, llama: Any
) -> None:
    loop, recorder = trained(llama, order=Order(fails))
    with pytest.raises(ZeroDivisionError, match=f"no batch {fails}") as caught:
        loop.run(5)
    assert [step for step, *_ in recorder.rows] == list(range(1, fails))
    assert "raise ZeroDivisionError" in "".join(traceback.format_exception(caught.value))
    assert batching() == []


def test_a_batch_that_cannot_be_made_is_no_concern_of_a_run_that_ends_before_it(llama: Any) -> None:
    loop, recorder = trained(llama, order=Order(fails=4))
    loop.run(3)
    assert [step for step, *_ in recorder.rows] == [1, 2, 3]


def test_an_interruption_ends_the_thread_too(llama: Any) -> None:
    class Interrupts(Hook):
        def after_step(self, record: StepRecord) -> None:
            raise KeyboardInterrupt

    loop = loop_of(llama, hooks=[Interrupts()])
    with pytest.raises(KeyboardInterrupt):
        loop.run(5)
    assert batching() == []


def test_a_step_may_be_asked_for_again_and_out_of_turn(llama: Any) -> None:
    order, loop = order_of(), loop_of(llama)

    def rows(batches: Sequence[Batch]) -> list[tuple[int, ...]]:
        return [batch.rows for batch in batches]

    with ahead(loop):
        assert isinstance(loop.batches, Ahead)
        for step in (1, 1, 2, 7, 3, 3, 4):
            assert rows(loop.batches.at(step)) == rows(order.at(step))
