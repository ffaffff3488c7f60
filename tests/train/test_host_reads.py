"""How often a step makes the host wait for a device: twice, whatever the model, the micro-batches and what trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.keys import Clock, key
from lowrank.train.flat import Flat
from lowrank.train.in_backward import InBackward
from lowrank.train.loop import Loop
from lowrank.train.optim import groups
from lowrank.train.precision import Precision
from lowrank.train.update import EachParameter, Update

CPU = torch.device("cpu")
READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy", "nonzero", "unique")


class Functions(TorchFunctionMode):
    """Counts calls, from Python, of what reads a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.seen[name] += 1
            with torch._C.DisableTorchFunction():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts operators that read a value, also those that torch's own Python or C++ calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "_unique2", "is_nonzero", "equal"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Points:
    """A micro-batch whose rows are its own inputs and targets."""

    x: Tensor  # (rows, 8)
    targets: Tensor  # (rows, 8)
    rows: tuple[int, ...] = (1, 2, 3)
    real_tokens: int = 3

    def to(self, device: torch.device) -> Points:
        return self if self.x.device.type == device.type else Points(self.x.to(device), self.targets.to(device))


class Order:
    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate

    def at(self, step: int) -> Sequence[Points]:
        drawn = [torch.randn(2, 3, 8, generator=key(step, n)) for n in range(self.accumulate)]
        return [Points(*both) for both in drawn]


def loop(updating: Callable[[torch.optim.Optimizer], Update], layers: int, accumulate: int, **changes: Any) -> Loop:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))).to(changes.get("device", CPU))
    parameters = dict(model.named_parameters())
    return Loop(
        model=model,
        parameters=parameters,
        batches=Order(accumulate),  # type: ignore[arg-type]
        loss=lambda model, batch: (model(batch.x) - batch.targets).square().sum(),
        optimizer=torch.optim.AdamW(groups(parameters, [], lr=1e-3, weight_decay=0.1), fused=True),
        schedule=lambda step: 1.0,
        precision=Precision(changes.pop("precision", "fp32"), changes.get("device", CPU)),
        clock=Clock(),
        updating=updating,
        **changes,
    )


def reads(one: Loop) -> tuple[int, int]:
    """Of the third step: calls from Python, operators."""
    one.run(2)
    with Functions() as functions, Operators() as operators:
        assert one.step() is not None
    return functions.seen.total(), operators.seen.total()


@pytest.mark.parametrize("updating", [Flat, EachParameter])
@pytest.mark.parametrize("max_norm", [1e-3, 1e9], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_reads_twice_whatever_its_layers_and_micro_batches(
    updating: Callable[[torch.optim.Optimizer], Update], max_norm: float, precision: str
) -> None:
    for layers, accumulate in ((1, 1), (7, 1), (1, 5), (4, 3)):
        one = loop(updating, layers, accumulate, max_norm=max_norm, precision=precision)
        one.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=precision == "fp16")
        assert reads(one) == (2, 1)  # a list of numbers, which is no operator; and one number


def test_a_penalty_and_hooks_add_none() -> None:
    one = loop(Flat, 3, 2)
    one.penalty = lambda: sum((p.square().sum() for p in one.parameters.values()), torch.zeros(()))
    assert reads(one) == (2, 1)


def test_in_backward_the_loss_is_one_more() -> None:
    for layers in (1, 6):
        assert reads(loop(InBackward, layers, 1)) == (3, 1)


@pytest.mark.cuda
@pytest.mark.parametrize("updating", [Flat, EachParameter])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_the_host_waits_as_often(updating: Any, precision: str, recwarn: pytest.WarningsRecorder) -> None:
    device = torch.device("cuda")
    one = loop(updating, 4, 1, precision=precision, device=device)
    batches = [[batch.to(device) for batch in one.batches.at(step)] for step in (1, 2, 3)]  # type: ignore[attr-defined]
    one.batches = type("There", (), {"at": lambda self, step: batches[step - 1]})()
    one.precision.scaler = torch.amp.GradScaler("cuda", init_scale=8.0, enabled=precision == "fp16")
    one.run(2)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        one.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in recwarn) == 2


def test_who_reads_is_counted() -> None:
    with Functions() as functions, Operators() as operators:
        one = torch.ones(3)
        assert (float(one.sum()), one.tolist(), bool(one[0] > 0), one.sum().item()) == (3.0, [1.0] * 3, True, 3.0)
    assert (functions.seen.total(), operators.seen.total()) == (4, 3)
