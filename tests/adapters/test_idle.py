"""What is not in use costs nothing: adapters that are resident, and layers below the lowest one that trains."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from documents import texts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lowrank
from lowrank.adapters import LoRA
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import plan
from lowrank.data.pack import Batch, pack
from lowrank.fast import block, linear
from lowrank.fast.loss import chunked
from lowrank.models import attention
from lowrank.train.loss import target_loss

LENGTHS = (7, 12, 3, 9)
R = 4
IN_PLACE = {torch.ops.aten.addmm_: lambda y, a, b, **more: 2 * a[0] * a[1] * b[1]}  # torch itself does not count it
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


class Operators(TorchDispatchMode):
    """Counts what is computed or allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def python_calls(function: Callable[[], Any]) -> int:
    """How many Python functions it enters."""
    count = 0

    def watch(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def resident(model: Any, names: str) -> Any:
    """The frozen model with a named LoRA each, the first of them in use and all training."""
    model.requires_grad_(False)
    assert attention.install(model) is None
    planned = plan(model, {"all-linear": partial(LoRA, r=R)})
    for name in names:
        apply(model, planned, name=name)
    lowrank.use(model, names[0])
    return model.train()


def step(model: Any, batch: Batch) -> None:
    target_loss(model, batch).backward()


@FUSED
def test_a_step_computes_the_same_however_many_adapters_are_resident(fused: bool, make_llama: Any) -> None:
    batch, counts = pack(texts(LENGTHS)), []
    for names in ("a", "abcdefgh"):
        model = resident(make_llama(), names)
        if fused:
            block.fuse(model)
        step(model, batch)  # what is made once
        with Operators() as operators:
            step(model, batch)
        counts.append((operators.calls, python_calls(lambda model=model: step(model, batch))))
        training = [name for name, p in named_trainable(model).items() if p.grad is not None]
        assert training
        assert all(".adapter.a." in name for name in training)
    assert counts[0] == counts[1]


def test_switching_computes_nothing_and_costs_the_same_among_many(make_llama: Any) -> None:
    calls = []
    for names in ("ab", "abcdefgh"):
        model = resident(make_llama(), names)
        with Operators() as operators:
            lowrank.use(model, "b")
            lowrank.use(model, None)
            lowrank.use(model, "a")
        assert not operators.calls
        calls.append(python_calls(lambda model=model: lowrank.use(model, "b")))
    assert calls[0] == calls[1]


def flops(model: Any, batch: Batch, fused: bool) -> tuple[int, int]:
    """Of products in forward and backward; torch does not count a CPU's attention."""
    loss = chunked(target_loss) if fused else target_loss
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as forward:
        value = loss(model, batch)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as backward:
        value.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def on_top(model: Any, targets: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The frozen model with LoRA on ``targets``; PyTorch's own products, since oneDNN's are not counted."""
    monkeypatch.setattr(linear, "cannot", lambda: "counted")
    model.requires_grad_(False)
    assert attention.install(model) is None
    apply(model, plan(model, {targets: partial(LoRA, r=R)}))
    if fused:
        assert block.fuse(model).startswith(f"{model.config.num_hidden_layers}/")
    return model.train()


@FUSED
@pytest.mark.parametrize("layers", ["0-2", "1-2", "2"])
def test_backward_stops_below_the_lowest_layer_that_trains(
    layers: str, fused: bool, make_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2N forward and 2Vd + 2N_k backward, of N parameters in products and N_k in the layers that train."""
    model = on_top(make_llama(num_hidden_layers=3), f"all-linear@{layers}", fused, monkeypatch)
    batch, k = pack(texts(LENGTHS)), 3 - int(layers[0])
    config, tokens, targets = model.config, sum(LENGTHS), len(batch.targets)
    d, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    read, layer, head = d * d + 2 * d * kv, 2 * d * d + 2 * d * kv + 3 * d * f, config.vocab_size * d
    ins, outs = 4 * d + 2 * d + f, 2 * d + 2 * kv + 2 * f + d  # of q k v o, gate up and down
    forward = tokens * (2 * 3 * layer + 2 * k * R * (ins + outs)) + 2 * targets * head
    again = R * ins if fused else 0  # A x, which is not kept
    backward = tokens * (2 * k * layer + 4 * k * R * (ins + outs) + 2 * k * again) + 2 * targets * head
    backward -= 2 * tokens * (read + 3 * R * d)  # nothing wants the gradient of the lowest trained layer's input
    found = flops(model, batch, fused)
    assert sum(found) == forward + backward


@pytest.mark.parametrize(
    ("make", "targets"),
    [("make_llama", name) for name in ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")]
    + [("make_gpt2", name) for name in ("c_attn", "*.attn.c_proj", "c_fc", "*.mlp.c_proj")],
)
def test_a_fused_block_makes_no_product_that_plain_autograd_leaves_out(
    make: str, targets: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, counts = pack(texts(LENGTHS)), []
    for fused in (False, True):
        model = request.getfixturevalue(make)()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model = on_top(model, f"{targets}@1", fused, monkeypatch)
        counts.append(sum(flops(model, batch, fused)))
        width = next(p.shape[1] for name, p in named_trainable(model).items() if name.endswith(".A"))
    assert counts[1] == counts[0] + 2 * sum(LENGTHS) * R * width  # A x, once more
