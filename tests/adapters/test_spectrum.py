"""What an adapter did to a weight, in numbers: held to a dense decomposition in fp64."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowrank.adapters import IA3, OFT, AdaLoRA, Adapted, Adapter, Bottleneck, DoRA, LoHa, LoKr, LoRA, VeRA, dense_weight
from lowrank.adapters.inject import apply
from lowrank.adapters.merge import merge
from lowrank.adapters.plan import Rules, plan
from lowrank.adapters.sites import adapted
from lowrank.adapters.spectrum import Update, effective_rank, overlap, overlaps, spectrum, stable_rank, update
from lowrank.quant.convert import quantize

METHODS: dict[str, Any] = {
    "lora": partial(LoRA, r=3),
    "rslora": partial(LoRA, r=3, rslora=True, alpha=5),
    "pissa": partial(LoRA, r=3, init="pissa"),
    "as wide as the layer": partial(LoRA, r=40),
    "dora": partial(DoRA, r=3),
    "adalora": partial(AdaLoRA, init_r=4, target_r=2),
    "vera": partial(VeRA, r=5),
    "ia3": IA3,
    "loha": partial(LoHa, r=2),
    "lokr": partial(LoKr, r=2),
    "oft": partial(OFT, block_size=8),
}


def trained(model: nn.Module, rules: Rules, seed: int = 0, **more: Any) -> nn.Module:
    """The adapters after some noise has trained them."""
    apply(model, plan(model, rules), seed, **more)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in adapted(model):
            for parameter in module.adapter.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    matrices = ((path, m) for path, m in model.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2)
    return {path: dense_weight(module).detach().double() for path, module in matrices}


def found(model: nn.Module) -> dict[str, Update]:
    made = {path: update(path, module) for path, module in adapted(model)}
    return {path: one for path, one in made.items() if one is not None}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_singular_values_of_what_it_merges_to(model: nn.Module, name: str, keep: bool) -> None:
    before = weights(model.double())
    trained(model, {"all-linear": METHODS[name]}, keep_base=keep)
    after = weights(merge(model.double())[0])
    updates = found(model)
    assert updates
    for path, one in updates.items():
        delta = after[path] - before[path]  # (out, in)
        S = torch.linalg.svdvals(delta)
        left, sigma, right = one.parts
        rank = len(sigma)
        assert torch.allclose(sigma, S[:rank], rtol=1e-6, atol=1e-6 * float(S[0]))
        assert float(S[rank:].norm()) <= 2e-5 * float(S[0])
        assert torch.allclose(left @ sigma.diag() @ right.T, delta, atol=2e-5 * float(S[0]))
        for vectors in (left, right):
            assert torch.allclose(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64), atol=1e-6)
        numbers = spectrum(one)
        assert numbers.change == pytest.approx(float(delta.norm() / before[path].norm()), rel=1e-5)
        p = S / S.sum()
        entropy = float(-(p * (p + 1e-300).log()).sum())
        assert numbers.effective_rank == pytest.approx(math.exp(entropy), rel=1e-3)
        assert numbers.stable_rank == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-6)


def test_an_embedding_is_a_weight_too(model: nn.Module) -> None:
    before = weights(model)
    trained(model, {"embedding": partial(LoRA, r=3)})
    after = weights(merge(model)[0])
    for path, one in found(model).items():
        S = torch.linalg.svdvals(after[path] - before[path])
        assert torch.allclose(one.parts[1], S[:3], rtol=1e-4)
        assert one.shape == tuple(before[path].shape)


def test_over_nf4_the_change_is_that_of_the_dequantised_weight(llama: LlamaForCausalLM) -> None:
    trained(quantize(llama), {"q_proj": partial(LoRA, r=3)})
    for path, one in found(llama).items():
        module = llama.get_submodule(path)
        A, B = module.adapter.A.detach().double(), module.adapter.B.detach().double()
        delta = module.adapter.scale * B @ A
        weight = dense_weight(module.base).double()
        assert spectrum(one).change == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-6)


def test_before_training_nothing_has_changed(model: nn.Module) -> None:
    for start in ("default", "pissa", "olora"):
        fresh = type(model)(model.config)
        apply(fresh, plan(fresh, {"all-linear": partial(LoRA, r=3, init=start)}))
        for one in map(spectrum, found(fresh).values()):
            assert one.change <= 1e-12
            assert (one.singular, one.effective_rank, one.stable_rank) == ((), 0.0, 0.0)


def test_a_start_that_nobody_kept_is_said(llama: LlamaForCausalLM) -> None:
    class Halved(LoRA):
        def rebased(self, base: nn.Module) -> nn.Module:
            half = copy.deepcopy(base)
            half.weight = nn.Parameter(dense_weight(base) / 2)
            return half

    module = llama.model.layers[0].self_attn.q_proj
    adapter = Halved(module, generator=torch.Generator().manual_seed(0), r=2)
    kept, lost = (Adapted(adapter.rebased(module), adapter, {}, kept) for kept in ((module,), ()))
    one, other = update("q", kept), update("q", lost)
    assert one is not None
    assert other is not None
    assert (one.changed_base, other.changed_base) == (False, True)
    assert spectrum(one).change == pytest.approx(0.5)  # W/2 − W: B is still zero
    assert spectrum(other).change == 0


def test_what_is_no_change_of_a_weight_has_no_spectrum(llama: LlamaForCausalLM) -> None:
    class Nonlinear(Adapter):
        def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
            super().__init__()

    trained(llama, {"blocks": Bottleneck})
    assert found(llama) == {}
    site = nn.Linear(4, 4)
    assert update("x", Adapted(site, Nonlinear(site, generator=torch.Generator()), {})) is None


def test_singular_values_that_cost_too_much_are_left_out(llama: LlamaForCausalLM) -> None:
    trained(llama, {"q_proj": partial(DoRA, r=3), "k_proj": partial(LoRA, r=3)})
    dense, low = (found(llama)[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert dense.work == 32**3
    assert low.work == (16 + 32) * 3**2
    cheap = spectrum(dense, most=32**3 - 1)
    assert (cheap.singular, cheap.effective_rank, cheap.stable_rank) == (None, None, None)
    assert cheap.change == spectrum(dense).change > 0
    assert spectrum(low, most=32**3 - 1) == spectrum(low)


def test_ranks_of_known_spectra() -> None:
    flat, one = torch.ones(7, dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    assert effective_rank(flat) == pytest.approx(7)
    assert stable_rank(flat) == pytest.approx(7)
    assert (effective_rank(one), stable_rank(one)) == (1.0, 1.0)
    steep = torch.tensor([1.0, 0.1], dtype=torch.float64)
    assert stable_rank(steep) == pytest.approx(1.01)
    assert 1 < effective_rank(steep) < 2


def orthonormal(n: int, k: int, seed: int) -> Tensor:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(values)[0]


def test_a_subspace_lies_in_itself_and_outside_of_what_is_orthogonal_to_it() -> None:
    Q = orthonormal(20, 8, 0)
    own, other = overlaps(Q[:, :4], Q[:, :4]), overlaps(Q[:, :4], Q[:, 4:])
    assert torch.allclose(own, torch.ones_like(own))  # φ(i, j) is 1 for i ≠ j too: one holds the other
    assert float(other.abs().max()) < 1e-20
    turned = Q[:, :4] @ orthonormal(4, 4, 1)
    assert overlaps(Q[:, :4], turned)[-1, -1] == pytest.approx(1)  # the basis does not matter
    assert overlaps(Q[:, :4], turned)[0, 0] < 1


def test_overlap_is_symmetric_within_0_and_1_and_equation_4_of_the_paper() -> None:
    one, other = orthonormal(30, 6, 0), orthonormal(30, 9, 1)
    phi = overlaps(one, other)
    assert torch.allclose(phi, overlaps(other, one).T)
    assert 0 <= float(phi.min()) <= float(phi.max()) <= 1
    for i in (1, 3, 6):
        for j in (1, 4, 9):
            expected = torch.linalg.matrix_norm(one[:, :i].T @ other[:, :j]) ** 2 / min(i, j)
            assert torch.allclose(phi[i - 1, j - 1], expected)


def test_random_subspaces_overlap_by_the_larger_one_s_share() -> None:
    phi = torch.stack([overlaps(orthonormal(64, 4, 2 * n), orthonormal(64, 8, 2 * n + 1)) for n in range(200)]).mean(0)
    assert float(phi[3, 7]) == pytest.approx(8 / 64, rel=0.05)
    assert float(phi[0, 0]) == pytest.approx(1 / 64, rel=0.5)


def test_two_adapters_of_one_site_are_compared_by_their_singular_vectors(llama: LlamaForCausalLM) -> None:
    first = trained(llama, {"q_proj": partial(LoRA, r=3)})
    second = trained(type(llama)(llama.config), {"q_proj": partial(LoRA, r=6)}, seed=1)
    for path, one in found(first).items():
        other = found(second)[path]
        shared = overlap(one, other)
        assert shared is not None
        assert (shared.first, shared.second) == ((1, 2, 3), (1, 2, 4, 6))
        (U1, _, V1), (U2, _, V2) = one.parts, other.parts
        assert shared.left[1][2] == pytest.approx(float((U1[:, :2].T @ U2[:, :4]).square().sum() / 2))
        assert shared.right[2][3] == pytest.approx(float((V1.T @ V2).square().sum() / 3))
        itself = overlap(one, one)
        assert itself is not None
        assert itself.left[-1][-1] == pytest.approx(1)
    fresh = type(llama)(llama.config)
    apply(fresh, plan(fresh, {"q_proj": LoRA}))
    [untrained, _] = found(fresh).values()
    assert overlap(one, untrained) is None
