"""One optimizer step against the textbook's, and what may not move a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import adamw, furthest, loop_of, order_of, same, values
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lowrank.adapters.inject import named_trainable
from lowrank.data.order import Batches
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.loop import Loop, State
from lowrank.train.loss import target_loss
from lowrank.train.optim import load_state, state_tensors

pytestmark = pytest.mark.usefixtures("both_ways")


class Witness(Hook):
    """Writes down what it is called with, and copies of parameters and gradients at that time."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.parameters: dict[str, dict[str, Tensor]] = {}
        self.gradients: dict[str, Tensor] = {}
        self.records: list[StepRecord] = []
        self.loop: Loop | None = None

    def before_update(self, step: int) -> None:
        self.note("before_update", step)
        if self.loop is not None:
            self.gradients = {n: p.grad.clone() for n, p in self.loop.parameters.items() if p.grad is not None}

    def after_update(self, step: int) -> None:
        self.note("after_update", step)

    def after_step(self, record: StepRecord) -> None:
        self.note("after_step", record.step)
        self.records.append(record)

    def note(self, what: str, step: int) -> None:
        self.calls.append((what, step))
        if self.loop is not None:
            self.parameters[what] = values(self.loop)


def witnessed(model: nn.Module, **changes: Any) -> tuple[Loop, Witness]:
    witness = Witness()
    loop = loop_of(model, hooks=[witness], **changes)
    witness.loop = loop
    return loop, witness


def textbook(loop: Loop, order: Batches, steps: int, max_norm: float) -> list[tuple[float, float]]:
    """Plain PyTorch on whole steps: mean over all target tokens, clip, AdamW at lr(step). (loss, norm) a step."""
    found = []
    parameters = list(loop.parameters.values())
    optimizer = adamw(dict(loop.parameters))
    for step in range(1, steps + 1):
        batches = order.at(step)
        optimizer.zero_grad()
        losses = [target_loss(loop.model, batch) for batch in batches]
        loss = torch.stack(losses).sum() / sum(len(batch.targets) for batch in batches)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step / 2 if step <= 2 else 1 - (step - 3) / 8)
        optimizer.step()
        found.append((float(loss.detach()), float(norm)))
    return found


def test_a_step_is_the_textbooks(llama64: LlamaForCausalLM, make_llama: Callable[..., LlamaForCausalLM]) -> None:
    loop, witness = witnessed(llama64, max_norm=0.3)
    other = loop_of(make_llama().double())
    loop.run(4)
    wanted = textbook(other, order_of(), 4, 0.3)
    assert furthest(values(loop), values(other)) < 1e-9
    for record, (loss, norm) in zip(witness.records, wanted, strict=True):
        assert (record.loss, record.grad_norm) == (pytest.approx(loss, abs=1e-7), pytest.approx(norm, abs=1e-6))


def test_accumulating_k_equals_one_batch_of_k(make_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    whole, witness = witnessed(make_gpt2(**dry).double(), order=order_of(micro_batch=6, accumulate=1))
    parts, other = witnessed(make_gpt2(**dry).double(), order=order_of(micro_batch=1, accumulate=6))
    counts = [len(batch.targets) for batch in parts.batches.at(1)]
    assert len(set(counts)) > 2  # a mean of means would differ
    whole.run(5)
    parts.run(5)
    assert furthest(values(whole), values(parts)) < 1e-6
    for one, two in zip(witness.records, other.records, strict=True):
        assert (one.target_tokens, one.real_tokens) == (two.target_tokens, two.real_tokens)
        assert (one.loss, one.grad_norm) == (pytest.approx(two.loss, abs=1e-6), pytest.approx(two.grad_norm, abs=1e-6))


def test_the_first_step_trains_at_one_over_warm_up_of_the_peak(llama: LlamaForCausalLM) -> None:
    loop, witness = witnessed(llama)
    before = values(loop)
    loop.run(4)
    assert [record.lr for record in witness.records] == pytest.approx([0.5e-2, 1e-2, 1e-2, 1e-2 * 7 / 8])
    assert not same(before, witness.parameters["after_step"])


@pytest.mark.parametrize("max_norm", [0.01, 1e6, math.inf])
def test_the_norm_is_the_one_before_clipping_and_gradients_are_no_longer_than_allowed(
    max_norm: float, llama64: LlamaForCausalLM, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    loop, witness = witnessed(llama64, max_norm=max_norm)
    loop.run(1)
    [(_, norm)] = textbook(loop_of(make_llama().double()), order_of(), 1, math.inf)
    assert witness.records[0].grad_norm == pytest.approx(norm, rel=1e-6)
    clipped = math.sqrt(sum(float(g.square().sum()) for g in witness.gradients.values()))
    assert clipped == pytest.approx(min(norm, max_norm), rel=1e-4)


def test_tokens_are_counted_for_the_step_alone_and_summed_in_the_state(llama: LlamaForCausalLM) -> None:
    loop, witness = witnessed(llama)
    loop.run(3)
    for record in witness.records:
        batches = loop.batches.at(record.step)
        assert record.target_tokens == sum(len(batch.targets) for batch in batches)
        assert record.real_tokens == sum(batch.real_tokens for batch in batches)
        assert record.tokens_per_s == pytest.approx(record.real_tokens / record.seconds)
        assert record.peak_memory_mb > 50
    assert loop.state.step == 3
    assert loop.state.target_tokens == sum(record.target_tokens for record in witness.records)
    assert loop.state.real_tokens == sum(record.real_tokens for record in witness.records)
    assert loop.state.seconds == pytest.approx(sum(record.seconds for record in witness.records))


def test_a_record_is_a_row_of_metrics(llama: LlamaForCausalLM) -> None:
    loop, witness = witnessed(llama)
    loop.run(1)
    names = "event step loss lr grad_norm target_tokens real_tokens tokens_per_s peak_memory_mb seconds spike"
    assert list(witness.records[0].to_dict()) == names.split()
    assert witness.records[0].to_dict()["event"] == "step"


def test_hooks_are_called_before_the_update_after_it_and_when_the_step_is_counted(llama: LlamaForCausalLM) -> None:
    loop, witness = witnessed(llama)
    before = values(loop)
    loop.run(1)
    assert same(witness.parameters["before_update"], before)
    assert not same(witness.parameters["after_update"], before)
    loop.run(3)
    order = ["before_update", "after_update", "after_step"]
    assert witness.calls == [(what, step) for step in (1, 2, 3) for what in order]


def test_running_again_goes_on_where_it_stopped_and_never_past_the_end(llama: LlamaForCausalLM) -> None:
    loop, witness = witnessed(llama)
    for steps in (2, 2, 1, 3):
        loop.run(steps)
    assert [record.step for record in witness.records] == [1, 2, 3]


def test_a_stop_finishes_the_step_and_leaves(llama: LlamaForCausalLM) -> None:
    class Stop(Hook):
        def after_step(self, record: StepRecord) -> None:
            loop.stop = record.step == 2

    loop = loop_of(llama, hooks=[Stop()])
    loop.run(5)
    assert loop.state.step == 2


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_penalty_is_added_once_a_step(
    accumulate: int, llama64: LlamaForCausalLM, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    def penalty() -> Tensor:
        return sum((p.double().square().sum() for p in loop.parameters.values()), torch.zeros(()))

    plain, witness = witnessed(make_llama().double(), order=order_of(accumulate=accumulate))
    plain.run(1)
    loop, other = witnessed(llama64, order=order_of(accumulate=accumulate), penalty=penalty)
    start = values(loop)
    loop.run(1)
    for name, gradient in other.gradients.items():
        torch.testing.assert_close(gradient, witness.gradients[name] + 2 * start[name], rtol=0, atol=1e-9)


def test_a_step_restores_the_default_generator(gpt2: GPT2LMHeadModel) -> None:
    loop = loop_of(gpt2, dropout=0.2)
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    loop.run(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.initial_seed() == 1234


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_models_own_dropout_and_the_adapters_replay_by_key(
    dropout: float, make_gpt2: Callable[..., GPT2LMHeadModel]
) -> None:
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loop, witness = witnessed(make_gpt2(), dropout=dropout)
        loop.run(3)
        runs.append((values(loop), [record.loss for record in witness.records]))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize(("own", "dropout"), [("gpt2", 0.0), ("llama", 0.5)], ids=["the model's", "the adapters'"])
def test_micro_batches_and_steps_draw_masks_of_their_own(
    own: str, dropout: float, request: pytest.FixtureRequest
) -> None:
    """The same document in each micro-batch of each step, nothing learnt: only the masks differ."""
    losses: list[float] = []

    def recorded(model: nn.Module, batch: Any) -> Tensor:
        loss = target_loss(model, batch)
        losses.append(float(loss.detach()))
        return loss

    order = order_of(micro_batch=1, accumulate=3)
    order.documents = [order.documents[1]] * 12
    model = request.getfixturevalue(own)
    loop = loop_of(model, dropout=dropout, order=order, loss=recorded, schedule=lambda step: 0.0)
    loop.run(2)
    assert len(set(losses)) == 6


def test_a_hook_that_only_observes_cannot_change_the_run(make_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    class Evaluates(Hook):
        def after_step(self, record: StepRecord) -> None:
            torch.manual_seed(record.step)
            torch.randn(100)
            watched.model.eval()
            with torch.no_grad():
                target_loss(watched.model, watched.batches.at(9)[0])

    plain, watched = (loop_of(make_gpt2().train(), dropout=0.2) for _ in range(2))
    watched.hooks = [Evaluates()]
    plain.run(4)
    watched.run(4)
    assert same(values(plain), values(watched))


def test_a_run_continued_from_its_state_is_the_uninterrupted_one_bit_for_bit(
    make_gpt2: Callable[..., GPT2LMHeadModel],
) -> None:
    whole, first, second = (loop_of(make_gpt2(), dropout=0.2) for _ in range(3))
    whole.run(5)
    first.run(2)
    tensors, plain = state_tensors(first.optimizer)
    with torch.no_grad():
        for name, parameter in second.parameters.items():
            parameter.copy_(first.parameters[name])
    load_state(second.optimizer, tensors, plain)
    second.state = State(**vars(first.state))
    second.run(5)
    assert same(values(whole), values(second))
    assert (second.state.step, second.state.target_tokens) == (5, whole.state.target_tokens)


def test_a_base_that_is_frozen_does_not_move(llama: LlamaForCausalLM) -> None:
    loop = loop_of(llama)
    trained = {id(p) for p in named_trainable(llama).values()}
    before = {name: p.clone() for name, p in llama.named_parameters() if id(p) not in trained}
    loop.run(3)
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters() if name in before)
    assert all(p.grad is None for p in llama.parameters() if id(p) not in trained)
