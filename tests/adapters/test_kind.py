"""A module of the base's own kind that holds another weight."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from lora_sites import IN, OUT, bias_of, x_of
from torch import Tensor, nn

from lowrank.adapters import dense_weight
from lowrank.adapters.kind import like
from lowrank.keys import key
from lowrank.quant.nf4 import NF4Linear


def other_weight() -> Tensor:
    return torch.randn(OUT, IN, generator=key(0, "other"))


def test_it_is_of_the_same_class_and_computes_with_the_weight_and_bias_it_is_given(base: nn.Module) -> None:
    weight, bias = other_weight(), None if bias_of(base) is None else torch.ones(OUT)
    new, x = like(base, weight, bias), x_of(5, IN, dtype=torch.float32)
    assert type(new) is type(base)
    held = weight
    if isinstance(base, NF4Linear):
        held = NF4Linear.from_dense(weight, None, double=base.double_quantized).dequantize()
        assert float((held - weight).norm() / weight.norm()) < 0.15
    assert torch.equal(dense_weight(new), held)
    torch.testing.assert_close(new(x), F.linear(x, held, bias), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in new.parameters())


def test_it_shares_no_tensor_and_no_hook_with_the_base_which_stays_as_it_was(base: nn.Module) -> None:
    base.register_forward_hook(lambda *_: None)
    before, x = {n: p.clone() for n, p in base.named_parameters()}, x_of(5, IN, dtype=torch.float32)
    new = like(base, other_weight(), bias_of(base))
    y = base(x)
    for parameter in new.parameters():
        parameter.data.zero_()
    assert torch.equal(base(x), y)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    assert (len(base._forward_hooks), len(new._forward_hooks)) == (1, 0)


@pytest.mark.parametrize("training", [False, True])
def test_it_is_in_the_bases_mode_and_has_its_faster_forward(base: nn.Module, training: bool) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, dense_weight(self), bias_of(self))

    vars(base)["forward"] = MethodType(forward, base.train(training))
    new, x = like(base, other_weight(), bias_of(base)), x_of(5, IN, dtype=torch.float32)
    assert new.training is training
    assert vars(new)["forward"].__self__ is new
    assert torch.equal(new(x), F.linear(x, dense_weight(new), bias_of(base)))


def test_an_embedding_takes_its_table_as_columns() -> None:
    base, weight = nn.Embedding(20, OUT), torch.randn(OUT, 20, generator=key(0, "other"))
    new = like(base, weight, None)
    assert torch.equal(new(torch.tensor([3, 7])), weight.T[[3, 7]])
    assert dense_weight(new).T.is_contiguous()


def test_without_values_it_has_the_shapes(base: nn.Module) -> None:
    meta = base.to("meta")
    new = like(meta, torch.empty(OUT, IN, device="meta"), bias_of(meta))
    assert {n: p.shape for n, p in new.named_parameters()} == {n: p.shape for n, p in base.named_parameters()}
    assert all(p.is_meta for p in new.parameters())
