"""Parameters that move within backward: as they would have after it, with one gradient at a time, and guarded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from documents import texts
from loops import CPU, LENGTHS, furthest, same, values
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lowrank.data.order import Batches
from lowrank.data.pack import pack
from lowrank.errors import ConfigError
from lowrank.keys import Clock
from lowrank.models import attention
from lowrank.train.checkpoint import Saved, read, save
from lowrank.train.finite import NotFinite
from lowrank.train.hooks import Hook, StepRecord
from lowrank.train.in_backward import InBackward, refuse
from lowrank.train.loop import Loop, State
from lowrank.train.loss import target_loss
from lowrank.train.optim import groups, load_state, state_tensors
from lowrank.train.precision import Precision
from lowrank.train.schedule import schedule
from lowrank.train.update import EachParameter

Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "adamw": torch.optim.AdamW,
    "adamw fused": lambda made: torch.optim.AdamW(made, fused=True),
    "sgd fused": lambda made: torch.optim.SGD(made, momentum=0.9, fused=True),
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "adamw8bit": lambda made: bitsandbytes.optim.AdamW8bit(made, min_8bit_size=128),
}
RULES = [{"match": "*mlp*", "lr_ratio": 0.5}]


class Records(Hook):
    def __init__(self) -> None:
        self.made: list[StepRecord] = []

    def after_step(self, record: StepRecord) -> None:
        self.made.append(record)


def full(model: Any, way: Any, kind: str = "adamw fused", **changes: Any) -> Loop:
    """A loop in which every weight of the model trains."""
    assert attention.install(model) is None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Loop(
        model=model,
        parameters=trained,
        batches=Batches(texts(LENGTHS), pack, seed=0, micro_batch=3, micro_batch_tokens=None, accumulate=1),
        loss=changes.pop("loss", target_loss),
        optimizer=OPTIMIZERS[kind](groups(trained, RULES, lr=1e-2, weight_decay=0.1)),
        schedule=schedule("linear", warmup=2, total=10),
        precision=Precision("fp32", CPU),
        clock=Clock(seed=3),
        updating=way,
        **changes,
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_is_the_ordinary_step_bit_for_bit(kind: str, make_llama: Callable[..., LlamaForCausalLM]) -> None:
    """Tied embeddings, groups and a schedule included."""
    records = [Records(), Records()]
    loops = [full(make_llama(), way, kind) for way in (EachParameter, InBackward)]
    for loop, hook in zip(loops, records, strict=True):
        loop.hooks = [hook]
        loop.run(4)
    assert same(values(loops[0]), values(loops[1]))
    assert same(*(state_tensors(loop.optimizer)[0] for loop in loops))
    assert state_tensors(loops[0].optimizer)[1] == state_tensors(loops[1].optimizer)[1]
    for one, other in zip(*(hook.made for hook in records), strict=True):
        assert (one.loss, one.lr) == (other.loss, other.lr)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)  # norms are summed in another order


def watched(model: nn.Module) -> Iterator[list[int]]:
    """Bytes of gradients that are there, each time that backward has made one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    seen: list[int] = []

    def look(_: Tensor) -> None:
        seen.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

    handles = [p.register_post_accumulate_grad_hook(look) for p in parameters]
    yield seen
    for handle in handles:
        handle.remove()


def test_gradients_take_the_largest_parameters_memory_and_no_more(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    most = []
    for way in (EachParameter, InBackward):
        model = make_llama()
        for seen in watched(model):
            full(model, way).run(2)
            most.append(max(seen))
    sizes = [p.nbytes for p in make_llama().parameters()]
    assert most == [sum(sizes), max(sizes)]


@pytest.mark.parametrize("kind", ["adamw fused", "adafactor", "adamw8bit"])
def test_a_checkpoint_goes_on_bit_for_bit(kind: str, make_gpt2: Callable[..., GPT2LMHeadModel], tmp_path: Path) -> None:
    whole, first, second = (full(make_gpt2(), InBackward, kind) for _ in range(3))
    whole.run(5)
    first.run(2)
    tensors, plain = state_tensors(first.optimizer)
    path = save(tmp_path, 2, Saved({"optimizer": tensors, "adapter": dict(first.parameters)}, {"optimizer": plain}))
    saved = read(path)
    with torch.no_grad():
        for name, parameter in second.parameters.items():
            parameter.copy_(saved.tensors["adapter"][name])
    load_state(second.optimizer, saved.tensors["optimizer"], saved.state["optimizer"])
    second.state = State(**vars(first.state))
    second.run(5)
    assert same(values(whole), values(second))
    assert same(*(state_tensors(loop.optimizer)[0] for loop in (whole, second)))


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("allowed", [0, 1])
def test_a_loss_that_is_not_finite_moves_nothing_and_may_be_skipped(
    allowed: int, trace: bool, llama: LlamaForCausalLM
) -> None:
    bad = next(iter(full(llama, EachParameter).batches.at(3))).rows
    loss = lambda model, batch: target_loss(model, batch) * (math.nan if batch.rows == bad else 1)  # noqa: E731
    loop = full(llama, InBackward, loss=loss, max_skipped=allowed, trace=trace)
    loop.run(2)
    before = values(loop)
    if allowed:
        loop.run(3)
        assert (loop.state.step, loop.state.skipped) == (3, 1)
        return
    with pytest.raises(NotFinite, match=r"^step 3: loss is nan in micro-batch 1 of 1 .* are those of step 2$"):
        loop.run(3)
    assert same(values(loop), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_does_not_reach_its_parameter_and_stops_the_run(
    kind: str, bad: float, llama: LlamaForCausalLM
) -> None:
    loop = full(llama, InBackward, kind, max_skipped=9, trace=True)
    loop.run(2)
    name = "model.layers.0.mlp.up_proj.weight"
    loop.parameters[name].register_hook(lambda grad: torch.full_like(grad, bad))
    before, moments = values(loop), {n: t.clone() for n, t in state_tensors(loop.optimizer)[0].items()}
    with pytest.raises(NotFinite) as caught:
        loop.run(5)
    shown = "nan" if math.isnan(bad) else "inf"
    assert re.match(
        rf"step 3: gradient of {re.escape(name)} is {shown} \(rows [\d, –]+\)\. Parameters that", str(caught.value)
    )
    assert "have moved" in caught.value.fault.trained
    assert loop.state.step == 2
    assert torch.equal(loop.parameters[name], before[name])
    assert all(torch.equal(t, moments[n]) for n, t in state_tensors(loop.optimizer)[0].items() if n.startswith(name))
    assert all(torch.isfinite(p).all() for p in loop.parameters.values())
    assert furthest(values(loop), before) > 0
    assert all(p.grad is None for p in loop.parameters.values())


def test_a_second_gradient_in_a_step_is_an_error_and_no_second_step(llama: LlamaForCausalLM) -> None:
    loop = full(llama, InBackward)
    loop.batches.accumulate = 2  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"^optim\.in_backward: \S+ had a second gradient in a step"):
        loop.run(1)


def test_released_parameters_are_as_any_others(llama: LlamaForCausalLM) -> None:
    loop = full(llama, InBackward)
    loop.run(1)
    loop.update.release()
    before = values(loop)
    target_loss(llama, loop.batches.at(1)[0]).backward()
    assert same(values(loop), before)
    assert all(p.grad is not None for p in loop.parameters.values())


def test_an_optimizer_that_may_look_at_several_parameters_is_refused() -> None:
    class Mine(torch.optim.AdamW):
        pass

    for cls in (Mine, torch.optim.LBFGS):
        with pytest.raises(ConfigError, match=rf"^optim\.in_backward: {cls.__name__} is not known to move each"):
            refuse(cls)
