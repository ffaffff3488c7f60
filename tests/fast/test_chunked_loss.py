"""The loss in chunks: cross-entropy's numbers and gradients, without the logits that it would keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lowrank.data.pack import pack, pad
from lowrank.fast import loss
from lowrank.fast.loss import Head, chunked, head_loss, head_of
from lowrank.keys import key
from lowrank.quant.convert import quantize
from lowrank.quant.nf4 import NF4Linear
from lowrank.train.loss import target_loss
from tests.documents import texts
from tests.fast.passes import LENGTHS, adapted, agree, trained

V, D = 500, 24


def head(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """A frozen layer from D to V whose logits spread widely."""
    weight, bias = 2 * torch.randn(V, 64, generator=key(0, "W")), torch.randn(V, generator=key(0, "b"))
    if kind == "nf4":
        return NF4Linear.from_dense(weight, bias, double=True)
    layer: Any = nn.Linear(64, V) if kind == "linear" else Conv1D(V, 64)
    with torch.no_grad():
        layer.weight.copy_(weight if kind == "linear" else weight.T)
        layer.bias.copy_(bias)
    return layer.to(dtype).requires_grad_(False)


def plain(h: Tensor, targets: Tensor, given: Head) -> Tensor:
    z = given.scale * given.layer(h)
    z = z if given.cap is None else given.cap * torch.tanh(z / given.cap)
    return F.cross_entropy(z, targets, reduction="sum")


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("cap", [None, 7.0])
@pytest.mark.parametrize("rows", [1, 9, 23])
def test_value_and_gradient_are_cross_entropys_in_fp64(
    kind: str, scale: float, cap: float | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "rows_at_once", lambda *_: 5)  # several chunks, the last one not full
    given = Head(head(kind), scale, cap)
    h = torch.randn(rows, 64, dtype=torch.float64, generator=key(0, "h"), requires_grad=True)
    targets = torch.randint(0, V, (rows,), generator=key(0, "t"))
    wanted = plain(h, targets, given)
    (expected,) = torch.autograd.grad(3 * wanted, h)
    found = head_loss(h, targets, given)
    (gradient,) = torch.autograd.grad(3 * found, h)
    assert abs(float(found.detach()) / float(wanted.detach()) - 1) <= 1e-12
    assert float((gradient - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


def test_no_target_is_a_loss_of_nothing() -> None:
    h = torch.zeros(0, 64, requires_grad=True)
    found = head_loss(h, torch.zeros(0, dtype=torch.int64), Head(head("linear", torch.float32)))
    found.backward()
    assert float(found.detach()) == 0
    assert h.grad is not None
    assert h.grad.shape == (0, 64)


def test_under_autocast_products_are_bf16_and_the_sum_is_fp32() -> None:
    given = Head(head("linear", torch.float32))
    h = torch.randn(40, 64, generator=key(0, "h"), requires_grad=True)
    targets = torch.randint(0, V, (40,), generator=key(0, "t"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = head_loss(h, targets, given), plain(h, targets, given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    (gradient,), (expected,) = torch.autograd.grad(found, h), torch.autograd.grad(wanted, h)
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("collate", [pack, pad])
@pytest.mark.parametrize("case", ["llama", "gpt2", "nf4"])
def test_a_models_loss_and_gradients_are_the_plain_ones(case: str, collate: Any, llama: Any, gpt2: Any) -> None:
    """GPT-2's head is tied to its embeddings."""
    model = adapted({"llama": llama, "gpt2": gpt2, "nf4": quantize(llama, skip=())}[case]).eval()
    batch = collate(texts(LENGTHS))
    value, wanted, _ = trained(model, batch)
    found = chunked(refused)(model, batch)
    model.zero_grad()
    found.backward()
    assert abs(float(found.detach()) / float(value) - 1) <= 1e-5
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and ".adapter." in name}
    agree({name.replace(".base", ""): g for name, g in gradients.items()}, wanted, 2e-5)


def refused(model: Any, batch: Any) -> Tensor:
    raise AssertionError("the plain loss was asked for")


@pytest.mark.parametrize("case", ["adapted", "trains", "hook", "hook on the model", "unknown"])
def test_a_head_that_is_more_than_a_frozen_layer_is_left_to_the_plain_loss(case: str, llama: Any) -> None:
    model = adapted(llama, targets="lm_head" if case == "adapted" else "all-linear")
    match case:
        case "trains":
            model.lm_head.weight.requires_grad_(True)
        case "hook":
            model.lm_head.register_forward_pre_hook(lambda *_: None)
        case "hook on the model":
            model.register_forward_hook(lambda *_: None)
        case "unknown":
            model.__class__ = type("Another", (type(model),), {})
    assert head_of(model) is None
    assert loss.describe(model).startswith("loss plain")
    batch = pack(texts(LENGTHS))
    assert float(chunked(target_loss)(model, batch).detach()) == float(target_loss(model, batch).detach())


class Made(TorchDispatchMode):
    """The largest tensor that an operation makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.most = max(self.most, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("vocabulary", "rows"), [(20_000, 512), (20_000, 2048), (80_000, 512)])
def test_memory_grows_neither_with_the_tokens_nor_with_tokens_times_vocabulary(vocabulary: int, rows: int) -> None:
    """No tensor is larger than a chunk's logits; between the passes there is the gradient alone."""
    layer = nn.Linear(4, vocabulary, bias=False).requires_grad_(False)
    h = torch.randn(rows, 4, generator=key(0, "h"), requires_grad=True)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with Made() as made, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head_loss(h, torch.zeros(rows, dtype=torch.int64), Head(layer))
    assert made.most <= max(loss.CHUNK, 4 * vocabulary * loss.ROWS["cpu"])
    assert kept == [h.nbytes]
