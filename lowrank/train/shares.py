"""Where the time of profiled steps went, by kind of work: self times of what PyTorch's profiler recorded.

Every moment of a step belongs to the innermost event that was running, and an event to one kind: that of the
innermost scope around it (the optimizer, a norm, attention …), else that of its own operator, else "python and other":
Python between operators, autograd's bookkeeping, views, allocation. On a CPU the kinds add up to the step. On CUDA
they are times of kernels, data aside, and what is left of the step is "python and other": there the device had
nothing to do, or did work of two kinds at once.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

STEP, FORWARD, DATA, NORM = "lowrank: step", "lowrank: forward", "lowrank: data", "lowrank: norm"
OTHER, UPDATE = "python and other", "optimizer"
KINDS = ("matmul", "attention", "norm", "dequantise", "elementwise", "loss", UPDATE, "data", OTHER)
MOST = 20  # operators that are listed

SCOPES = (  # kind, and what events open it; the first that fits
    ("data", re.compile(re.escape(DATA))),
    (UPDATE, re.compile(r"Optimizer\.")),
    ("dequantise", re.compile(r".*dequantize")),
    ("loss", re.compile(r"FrozenHeadLoss|aten::(_?log_softmax|nll_loss|cross_entropy|linear_cross)|(Nll|LogSoftmax)")),
    (
        "attention",
        re.compile(r"DocumentAttention|aten::(_?scaled_dot|_\w*(flash|efficient)_att)|Scaled"),
    ),
    ("norm", re.compile(rf"{re.escape(NORM)}|aten::(_fused_|native_)?(rms|layer)_norm|Native(Layer)?Norm")),
)
MATMUL = re.compile(r"aten::(_scaled_)?(mm|addmm_?|bmm|baddbmm_?|matmul|linear|addmv_?|mv|dot)$|mkl(dnn)?::_\w*linear")
NOTHING = re.compile(
    r"aten::(\w*view\w*|\w*reshape\w*|t|numpy_T|m?[TH]|transpose|permute|slice|select|narrow|expand\w*|as_strided"
    r"|(un)?squeeze_?|(un)?flatten|unbind|split\w*|chunk|detach_?|alias|empty\w*|new_empty\w*|resize_|to|result_type"
    r"|promote_types|resolve_\w+|lift_fresh|set_|record_stream)$"
)
BACKWARD = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Shares:
    """Of ``steps`` steps in a row, ``first`` the first of them."""

    first: int
    steps: int
    device: str
    step_ms: float  # mean wall time of a step, the profiler's own cost in it
    ms: dict[str, float]  # of KINDS, a step
    operators: tuple[tuple[str, int, float], ...]  # name, calls a step, ms a step: of the most time

    @property
    def shares(self) -> dict[str, float]:
        return {kind: time / self.step_ms if self.step_ms else 0.0 for kind, time in self.ms.items()}

    def to_dict(self) -> dict[str, Any]:
        names = ("name", "calls", "ms")
        operators = [dict(zip(names, row, strict=True)) for row in self.operators]
        steps = {"first": self.first, "steps": self.steps, "device": self.device, "step_ms": self.step_ms}
        return {**steps, "ms": self.ms, "shares": self.shares, "operators": operators}

    def __str__(self) -> str:
        last = self.first + self.steps - 1
        head = f"profile of steps {self.first} to {last}: {self.step_ms:,.1f} ms a step under the profiler"
        rows = [f"  {kind:<17}{share:7.1%}{self.ms[kind]:11,.1f} ms" for kind, share in self.shares.items()]
        return "\n".join([head, *rows])


def shares(events: Iterable[Any], first: int, device: str) -> Shares:
    """``events`` are those of a profiler (``FunctionEvent``), in which each step is a range called STEP."""
    events = list(events)
    steps = sorted((e.time_range.start, e.time_range.end) for e in events if e.name == STEP and on_cpu(e))
    threads = {event.thread for event in events if event.name == STEP}  # on CUDA, backward has one of its own
    inside = [
        event
        for event in events
        if on_cpu(event) and within(steps, event.time_range.start) and (device != "cpu" or event.thread in threads)
    ]
    made = {e.sequence_nr: e for e in reversed(inside) if e.sequence_nr >= 0 and not is_backward(e)}
    spent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    by_name: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in inside:
        kind = kind_of(event, made)
        time = event.self_cpu_time_total if device == "cpu" or kind == "data" else event.self_device_time_total
        spent[kind] += time
        if not event.name.startswith("lowrank: "):
            by_name[event.name] += time
            calls[event.name] += 1
    count, wall = max(1, len(steps)), sum(end - start for start, end in steps)
    if device != "cpu":
        spent[OTHER] = max(0.0, wall - sum(time for kind, time in spent.items() if kind != OTHER))
    most = sorted(by_name, key=lambda name: -by_name[name])[:MOST]
    operators = tuple((name, round(calls[name] / count), by_name[name] / count / 1e3) for name in most)
    each = {kind: time / count / 1e3 for kind, time in spent.items()}
    return Shares(first, len(steps), device, wall / count / 1e3, each, operators)


def on_cpu(event: Any) -> bool:
    """Not a kernel's own event: a kernel's time is with the operator that started it."""
    return "CPU" in str(event.device_type)


def within(steps: Sequence[tuple[float, float]], time: float) -> bool:
    place = bisect_right(steps, (time, float("inf"))) - 1
    return place >= 0 and time <= steps[place][1]


def kind_of(event: Any, made: dict[int, Any]) -> str:
    """``made`` holds, by its number, the forward operator that a backward's node belongs to."""
    found, root = scope(event)
    if found is None and is_backward(root):
        found = next((scope(made[n])[0] for n in numbers(event) if n in made), None)
        found = None if found == "data" else found
    if found is not None:
        return found
    if MATMUL.match(event.name):
        return "matmul"
    if "::" not in event.name or event.name.startswith((BACKWARD, "torch::autograd")) or NOTHING.match(event.name):
        return OTHER
    return "elementwise" if root.name == FORWARD or is_backward(root) else UPDATE  # norm and clip stand around it


def scope(event: Any) -> tuple[str | None, Any]:
    """The kind of the innermost scope around an event, and the outermost event around it within its step."""
    found, here = None, event
    while True:
        found = found or next((kind for kind, opens in SCOPES if opens.match(here.name)), None)
        above = here.cpu_parent
        if above is None or above.name == STEP:
            return found, here
        here = above


def numbers(event: Any) -> Iterable[int]:
    """The numbers of the backward nodes around an event, the innermost first."""
    while event is not None:
        if event.sequence_nr >= 0 and "Backward" in event.name:
            yield event.sequence_nr
        event = event.cpu_parent


def is_backward(event: Any) -> bool:
    return event.name.startswith(BACKWARD) or "Backward" in event.name
