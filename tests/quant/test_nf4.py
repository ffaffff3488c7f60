"""NF4Linear: bitsandbytes' own bytes, in state that no cast can ruin, and dense-weight gradients."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.keys import key
from lowrank.quant.nf4 import NF4Linear

SHAPES = [(64, 128), (48, 32), (300, 70), (7, 9), (1, 1), (3, 5)]  # the last ones leave a block, or a byte, half full
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight_of(shape: tuple[int, int] = (64, 128), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=key(0, "weight", shape)).to(dtype)


def layer_of(shape: tuple[int, int] = (64, 128), *, bias: bool = False, **options: Any) -> NF4Linear:
    values = torch.randn(shape[0], generator=key(0, "bias")) if bias else None
    return NF4Linear.from_dense(weight_of(shape), values, **{"double": True, **options})


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (300, 64)], ids=str)
def test_dequantised_bytes_are_those_of_linear4bit(shape: tuple[int, int], dtype: torch.dtype, double: bool) -> None:
    weight = weight_of(shape, dtype)
    theirs = bitsandbytes.nn.Linear4bit(shape[1], shape[0], bias=False, compress_statistics=double, quant_type="nf4")
    theirs.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=double, quant_type="nf4"
    )
    held = theirs.to("cpu").weight  # quantised as it moves
    wanted = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
    ours = NF4Linear.from_dense(weight, None, double=double)
    assert torch.equal(ours.packed, held.data.view(-1))
    assert wanted.dtype == dtype
    assert torch.equal(ours.dequantize(dtype), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_each_weight_is_its_level_times_the_scale_of_its_block_whatever_the_width(dtype: torch.dtype) -> None:
    """A block runs on over the ends of rows: bitsandbytes' CPU kernel, asked for rows of 48, takes other scales."""
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    wrong = []
    for width in range(1, 200):
        layer = layer_of((24, width), double=False)
        codes = torch.stack([layer.packed >> 4, layer.packed & 15], dim=1).view(-1)[: 24 * width].long()
        scales = layer.absmax.view(torch.float32).repeat_interleave(64)[: 24 * width]
        if not torch.equal(layer.dequantize(dtype), (levels[codes] * scales).to(dtype).view(24, width)):
            wrong.append(width)
    assert not wrong


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_weight_comes_back_within_half_a_level(shape: tuple[int, int], double: bool) -> None:
    weight = weight_of(shape)
    back = layer_of(shape, double=double).dequantize()
    assert back.shape == shape
    blocks = F.pad(weight.view(-1), (0, -weight.numel() % 64)).view(-1, 64)
    scales = blocks.abs().amax(1).repeat_interleave(64)[: weight.numel()].view(shape)
    rounding = 0.02 if double else 1e-6  # of the scales themselves
    assert ((back - weight).abs() <= 0.152 * scales + rounding * scales.max()).all()


def test_the_relative_error_on_gaussian_weights_is_nf4s() -> None:
    weight = weight_of((512, 512))
    error = (NF4Linear.from_dense(weight, None, double=True).dequantize() - weight).norm() / weight.norm()
    assert 0.085 < float(error) < 0.1


def test_fp64_weights_are_quantised_as_their_fp32_values() -> None:
    weight = weight_of()
    assert same_state(NF4Linear.from_dense(weight.double(), None, double=True), layer_of())


@pytest.mark.parametrize("double", [True, False])
def test_all_quantised_state_is_uint8_and_nothing_hides_outside_the_state_dict(double: bool) -> None:
    layer = layer_of(double=double)
    names = {"packed", "absmax", "nested"} if double else {"packed", "absmax"}
    assert layer.state_dict().keys() == names == {name for name, _ in layer.named_parameters()}
    assert {t.dtype for t in layer.state_dict().values()} == {torch.uint8}
    assert not any(p.requires_grad for p in layer.parameters())
    assert not list(layer.buffers())
    assert not [name for name, value in vars(layer).items() if isinstance(value, Tensor)]


@pytest.mark.parametrize("double", [True, False])
def test_casting_the_module_leaves_the_weight_bit_identical(double: bool) -> None:
    layer = layer_of(double=double, bias=True)
    before = layer.dequantize()
    for cast in (layer.bfloat16, layer.half, layer.double, layer.float):
        cast()
        assert torch.equal(layer.dequantize(), before)
    layer.to(torch.float16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    assert torch.equal(layer.dequantize(), before)


@pytest.mark.parametrize("shape", [(5, 128), (2, 5, 128), (128,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_forward_and_backward_are_those_of_the_dense_weight(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    layer = layer_of(bias=bias)
    x = torch.randn(shape, generator=key(0, "x")).to(dtype).requires_grad_()
    grad = torch.randn((*shape[:-1], 64), generator=key(0, "grad")).to(dtype)
    plain = F.linear(x, layer.dequantize(dtype)) + (layer.bias.to(dtype) if layer.bias is not None else 0)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, plain)
    [found], [wanted] = torch.autograd.grad(y, [x], grad), torch.autograd.grad(plain, [x], grad)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=torch.finfo(dtype).eps * float(wanted.abs().max()))


def test_finite_differences_agree_in_fp64() -> None:
    layer = layer_of((8, 12), bias=True)
    x = torch.randn(3, 12, generator=key(0, "x"), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_fp64_goes_through_the_fp32_weight() -> None:
    layer = layer_of()
    assert torch.equal(layer.dequantize(torch.float64), layer.dequantize(torch.float32).double())


def test_autocast_decides_what_it_computes_in() -> None:
    layer, x = layer_of(bias=True), torch.randn(5, 128, generator=key(0, "x"), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, dense = layer(x), F.linear(x, layer.dequantize(), layer.bias)
    assert y.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(y, dense, rtol=0.02, atol=0.1)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_a_compute_dtype_of_its_own_holds_and_the_output_is_the_inputs() -> None:
    layer, x = layer_of(compute_dtype=torch.bfloat16), torch.randn(5, 128, generator=key(0, "x"))
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, F.linear(x.bfloat16(), layer.dequantize(torch.bfloat16)).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_between_forward_and_backward_no_dense_weight_lives(dtype: torch.dtype) -> None:
    layer, x = layer_of(), torch.randn(5, 128, generator=key(0, "x")).to(dtype).requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    gc.collect()
    size = 64 * 128
    alive = [t for t in gc.get_objects() if type(t) is Tensor and t.is_floating_point() and t.numel() == size]
    assert not alive
    assert all(t.dtype == torch.uint8 for t in saved)
    y.sum().backward()


@pytest.mark.parametrize("double", [True, False])
def test_a_state_dict_goes_into_an_empty_layer_bit_for_bit(double: bool) -> None:
    layer = layer_of(double=double, bias=True)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty = NF4Linear(128, 64, double=double)
    empty.load_state_dict(torch.load(file, weights_only=True))
    assert same_state(layer, empty)
    assert torch.equal(layer.dequantize(), empty.dequantize())
    assert not any(p.requires_grad for p in empty.parameters())


def test_a_state_dict_that_lacks_the_weight_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="packed"):
        NF4Linear(128, 64, double=True).load_state_dict({})


@pytest.mark.parametrize("double", [True, False])
def test_a_state_dict_without_this_layer_leaves_it_alone(double: bool) -> None:
    """``model.load_state_dict(adapters, strict=False)`` visits every layer of the model."""
    layer = layer_of(double=double, bias=True)
    before, weight = copy.deepcopy(layer), layer.dequantize()
    nn.Sequential(layer, nn.Linear(64, 2)).load_state_dict({"1.weight": torch.zeros(2, 64)}, strict=False)
    assert same_state(layer, before)
    assert torch.equal(layer.dequantize(), weight)


@pytest.mark.parametrize("double", [True, False])
def test_a_state_dict_of_the_other_quantisation_is_an_error_or_right(double: bool) -> None:
    layer, other = layer_of(double=double), NF4Linear(128, 64, double=not double)
    try:
        other.load_state_dict(layer.state_dict())
    except RuntimeError:
        return
    assert torch.equal(other.dequantize(), layer.dequantize())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_on_the_meta_device_has_the_sizes_of_the_real_one(shape: tuple[int, int], double: bool) -> None:
    real = layer_of(shape, double=double)
    empty = NF4Linear.from_dense(torch.empty(shape, device="meta"), None, double=double)
    sizes = {name: (t.shape, t.dtype) for name, t in real.state_dict().items()}
    assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == sizes
    assert all(p.is_meta for p in empty.parameters())
    assert real.nbytes == empty.nbytes == sum(t.numel() for t in real.state_dict().values())


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_bits_a_weight_are_the_papers(double: bool, bits: float) -> None:
    layer = layer_of((512, 1024), double=double)
    assert 8 * layer.nbytes / (512 * 1024) == pytest.approx(bits, abs=0.002)


def test_quantising_does_not_touch_the_dense_weight_nor_share_its_memory() -> None:
    weight, bias = weight_of(), torch.ones(64)
    before = weight.clone()
    layer = NF4Linear.from_dense(weight, bias, double=True)
    assert torch.equal(weight, before)
    weight.zero_()
    assert layer.dequantize().any()


def test_quantising_prints_nothing() -> None:
    code = (
        "import torch; from lowrank.quant.nf4 import NF4Linear as N; N.from_dense(torch.ones(8, 8), None, double=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
