"""Rounding to NF4 codes that keeps a layer's output: against the plain algorithm in fp64, brute force, and its goal."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lowrank.keys import key
from lowrank.quant.nf4 import NF4Linear, nf4_levels
from lowrank.quant.rounding import damped, descended, feedback, nearest, output_error, rounded, weights

OUT, IN, TOKENS = 48, 96, 400
LEVELS = nf4_levels(torch.device("cpu")).double()


def layer_of(out: int = OUT, into: int = IN, *, double: bool = True) -> NF4Linear:
    return NF4Linear.from_dense(torch.randn(out, into, generator=key(0, "W")), None, double=double)


def inputs(tokens: int = TOKENS, into: int = IN) -> Tensor:
    """(tokens, in) with most of the energy in a few directions, as a layer's inputs have it."""
    directions = torch.linalg.qr(torch.randn(into, into, generator=key(0, "directions")))[0]
    sizes = 10 ** torch.linspace(1, -1.5, into)
    return torch.randn(tokens, into, generator=key(0, "x", tokens)) * sizes @ directions


def small_change(layer: NF4Linear, size: float = 0.01, rank: int = 2) -> Tensor:
    """W + ΔW with ‖ΔW‖ = size · ‖W‖, ΔW = B A with A's rows made of inputs, as gradients make them."""
    weight = layer.dequantize()
    into = weight.shape[1]
    A = torch.randn(rank, 8, generator=key(0, "A")) @ inputs(8, into)
    B = torch.randn(weight.shape[0], rank, generator=key(0, "B"))
    return weight + size * weight.norm() * (B @ A) / (B @ A).norm()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(48, 96), (7, 9), (1, 1), (300, 70)], ids=str)
def test_a_layer_dequantises_to_exactly_the_levels_that_its_codes_name(shape: tuple[int, int], double: bool) -> None:
    layer = layer_of(*shape, double=double)
    assert torch.equal(weights(layer.codes(), layer.scales()), layer.dequantize())
    codes = torch.randint(0, 16, shape, generator=key(0, "codes"), dtype=torch.uint8)
    scales = layer.scales()
    layer.recode(codes)
    assert torch.equal(layer.codes(), codes)
    assert torch.equal(layer.scales(), scales)
    assert torch.equal(layer.dequantize(), nf4_levels(torch.device("cpu"))[codes.long()] * scales)


def test_a_twin_has_the_weight_and_shares_no_memory() -> None:
    layer, bias = layer_of(), torch.ones(OUT)
    weight = layer.dequantize()
    twin = layer.twin(bias)
    assert torch.equal(twin.dequantize(), weight)
    twin.recode(torch.zeros(OUT, IN, dtype=torch.uint8))
    twin.absmax.data.zero_()
    bias.zero_()
    assert twin.bias is not None
    assert twin.bias.min() == 1
    assert torch.equal(layer.dequantize(), weight)


def test_what_stands_on_levels_already_stays() -> None:
    layer = layer_of()
    moment = inputs().T @ inputs()
    for codes in (layer.codes(), torch.zeros_like(layer.codes())):
        assert torch.equal(rounded(layer.dequantize(), layer.scales(), moment, codes), layer.codes())


def test_without_correlations_each_weight_takes_its_nearest_level() -> None:
    layer = layer_of()
    target = small_change(layer, 0.3)
    distance = (target.double()[..., None] - LEVELS * layer.scales().double()[..., None]).abs()  # (out, in, 16)
    wanted = distance.argmin(-1)
    assert torch.equal(nearest(target, layer.scales()).long(), wanted)
    assert torch.equal(feedback(target, layer.scales(), torch.eye(IN)).long(), wanted)


def gptq(target: Tensor, scales: Tensor, moment: Tensor) -> Tensor:
    """The published algorithm, column by column in fp64: the largest inputs first, each rounding's error spread over
    the columns left by the rows of the upper Cholesky factor of H⁻¹."""
    order = moment.diagonal().argsort().flip(0)
    W, S = target.double()[:, order], scales.double()[:, order]
    U = torch.linalg.cholesky(torch.linalg.inv(moment.double()[order][:, order]), upper=True)
    codes = torch.empty(W.shape, dtype=torch.uint8)
    for j in range(W.shape[1]):
        codes[:, j] = (W[:, j, None] - LEVELS * S[:, j, None]).abs().argmin(1).to(torch.uint8)
        error = (W[:, j] - LEVELS[codes[:, j].long()] * S[:, j]) / U[j, j]
        W[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
    return codes[:, order.argsort()]


@pytest.mark.parametrize("size", [0.01, 0.3])
def test_error_feedback_is_gptq(size: float) -> None:
    layer = layer_of(into=160)  # more than two groups of columns
    moment = damped(inputs(into=160).T @ inputs(into=160)).double()
    target, scales = small_change(layer, size).double(), layer.scales().double()
    found = feedback(target, scales, moment)
    assert (found != layer.codes()).float().mean() > 0.01
    assert torch.equal(found, gptq(target, scales, moment))


def test_descent_ends_where_no_single_code_can_be_bettered() -> None:
    layer = layer_of(4, 64)
    moment = damped(inputs(into=64).T @ inputs(into=64))
    target, scales = small_change(layer, 0.05), layer.scales()
    codes = descended(target, scales, moment, feedback(target, scales, moment), passes=100)
    H = moment.double()
    for row in range(4):
        E = (weights(codes, scales) - target).double()[row]
        best = E @ H @ E
        for j, code in itertools.product(range(64), range(16)):
            changed = E.clone()
            changed[j] = LEVELS[code] * scales[row, j].double() - target[row, j].double()
            assert changed @ H @ changed >= best * (1 - 1e-5)


def test_it_comes_near_the_best_of_all_codes() -> None:
    """All 16⁴ codes of rows of four weights, by brute force."""
    layer, moment = layer_of(32, 4), damped(inputs(into=4).T @ inputs(into=4))
    target, scales = small_change(layer, 0.1), layer.scales()
    every = LEVELS[torch.cartesian_prod(*[torch.arange(16)] * 4)]  # (65536, 4)
    error = every * scales[:, None].double() - target[:, None].double()  # (out, 65536, 4)
    least = ((error @ moment.double()) * error).sum(-1).amin(1)  # (out,)
    codes = rounded(target, scales, moment, layer.codes())
    found = output_error(weights(codes, scales) - target, moment)
    assert (found >= least * (1 - 1e-4)).all()
    assert found.sum() <= 1.5 * least.sum()


def test_a_small_change_survives_where_nearest_rounding_loses_it() -> None:
    """3 % of the weight, on inputs that the codes were not fitted to."""
    layer = layer_of(192, 192)
    target, scales, start = small_change(layer, 0.03), layer.scales(), layer.codes()
    X, held_out = inputs(4000, 192), inputs(1000, 192)
    change = held_out @ (target - layer.dequantize()).T

    def lost(codes: Tensor) -> float:
        return float((held_out @ (weights(codes, scales) - target).T).norm() / change.norm())

    by_feedback = lost(feedback(target, scales, damped(X.T @ X)))
    assert lost(nearest(target, scales)) > 0.9
    assert by_feedback < 0.5
    assert lost(rounded(target, scales, X.T @ X, start)) < 0.95 * by_feedback


@pytest.mark.parametrize("tokens", [0, 3, TOKENS])
def test_no_row_is_ever_further_from_its_target_than_with_the_codes_from_before(tokens: int) -> None:
    layer, X = layer_of(), inputs(tokens)
    X[:, ::7] = 0  # inputs that calibration never saw
    target, scales, start = small_change(layer, 0.002), layer.scales(), layer.codes()
    codes = rounded(target, scales, X.T @ X, start)
    new, old = (output_error(weights(c, scales) - target, damped(X.T @ X)) for c in (codes, start))
    assert codes.dtype == torch.uint8
    assert codes.max() <= 15
    assert (new <= old).all()


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.randn(8, 64, generator=key(0, "W"))
    weight[3] = 0
    layer = NF4Linear.from_dense(weight, None, double=False)
    target = layer.dequantize()
    moment = inputs(into=64).T @ inputs(into=64)
    target[3] += 0.01
    codes = rounded(target, layer.scales(), moment, layer.codes())
    assert (weights(codes, layer.scales())[3] == 0).all()
    assert torch.equal(codes[:3], layer.codes()[:3])


def test_half_precision_gives_the_codes_of_its_fp32_values() -> None:
    layer = layer_of()
    target, moment = small_change(layer).bfloat16(), inputs().T @ inputs()
    found = rounded(target, layer.scales(), moment, layer.codes())
    assert torch.equal(found, rounded(target.float(), layer.scales(), moment, layer.codes()))
