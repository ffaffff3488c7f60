"""VeRA against its equation in plain autograd, and the one pair of matrices that all its sites share."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_sites import IN, OUT, bias_of, saved_storages, x_of
from torch import Tensor, nn

from lowrank.adapters import Adapted, VeRA, dense_weight
from lowrank.adapters.inject import adapter_state, apply, current_plan, named_trainable, remove
from lowrank.adapters.merge import merge
from lowrank.adapters.methods.dropout import dropped_positions
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import adapted
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.classes import check_adapter
from lowrank.errors import ConfigError
from lowrank.keys import Clock, key

R = 6
WIDER = {"this": (OUT, IN), "wider": (OUT + 5, IN + 3)}  # another site's shape, so that this one takes a part


def wrap(base: nn.Module, *, clock: Clock | None = None, **options: Any) -> Adapted:
    shared = VeRA.shared(WIDER, generator=key(0, "shared"), r=R, **options)
    adapter = VeRA(base, generator=key(0), r=R, **options, **shared)
    adapter.b.data.normal_(generator=key(0, "b"))
    adapter.d.data.normal_(generator=key(0, "d"))
    adapter.clock, adapter.group = clock or Clock(), "parent:16"
    return Adapted(base, adapter, options)


def vera(wrapped: nn.Module) -> VeRA:
    adapter = wrapped.adapter
    assert isinstance(adapter, VeRA)
    return adapter


def check_against_equation(wrapped: Adapted, x: Tensor, kept: Tensor | float = 1.0) -> None:
    """W x + β + b ∘ B (d ∘ A (kept ∘ x)), plainly."""
    adapter, base = vera(wrapped), wrapped.base
    plain_x, b, d = (p.detach().clone().requires_grad_() for p in (x, adapter.b, adapter.d))
    A, B = adapter.A[:, :IN].detach(), adapter.B[:OUT].detach()
    expected = F.linear(plain_x, dense_weight(base).to(x.dtype), bias_of(base))
    expected = expected + b * F.linear(d * F.linear(plain_x * kept, A), B)
    actual = wrapped(x)
    grad = torch.randn(expected.shape, generator=key(0, "grad"), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, [plain_x, b, d], grad)
    found = torch.autograd.grad(actual, [x, adapter.b, adapter.d], grad)
    for one, other in zip((actual, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * float(other.detach().abs().max()))


@pytest.mark.parametrize("shape", [(5, IN), (2, 5, IN), (IN,)], ids=str)
def test_output_and_every_gradient_are_the_equations(base: nn.Module, shape: tuple[int, ...]) -> None:
    check_against_equation(wrap(base).double(), x_of(*shape))


def test_backward_drops_what_forward_dropped(base: nn.Module) -> None:
    clock = Clock(4)
    clock.set(3, 1)
    wrapped, x = wrap(base, dropout=0.4, clock=clock).double().train(), x_of(2, 5, IN)
    positions = dropped_positions(x.numel(), 0.4, clock.draw("parent:16"), torch.device("cpu"))
    kept = torch.full((x.numel(),), 1 / 0.6, dtype=torch.float64).index_fill(0, positions, 0).view(x.shape)
    check_against_equation(wrapped, x, kept)
    check_against_equation(wrapped.eval(), x)


def test_finite_differences_agree(base: nn.Module) -> None:
    wrapped, x = wrap(base).double(), x_of(4, IN)
    inputs = (x, vera(wrapped).b, vera(wrapped).d)
    assert torch.autograd.gradcheck(lambda x, *_: wrapped(x), inputs, fast_mode=True)


def test_the_merged_weight_is_the_wrapped_call(base: nn.Module) -> None:
    wrapped, x = wrap(base).double(), x_of(2, 5, IN).detach()
    weight, bias = vera(wrapped).merged(dense_weight(base).double(), bias_of(base))
    torch.testing.assert_close(F.linear(x, weight, bias), wrapped(x), rtol=0, atol=1e-12)


def test_it_starts_at_its_base_with_d_initial_and_matrices_drawn_as_kaiming_has_them() -> None:
    shared = VeRA.shared({"a": (30, 500), "b": (400, 20)}, generator=key(0), r=64)
    base = nn.Linear(20, 400)
    adapter, x = VeRA(base, generator=key(0), r=64, d_initial=0.3, **shared), torch.randn(5, 20)
    assert torch.equal(adapter(base, x), base(x))
    assert torch.equal(adapter.d, torch.full((64,), 0.3))
    for matrix, shape in ((adapter.A, (64, 500)), (adapter.B, (400, 64))):
        assert matrix.shape == shape
        assert not matrix.requires_grad
        bound = math.sqrt(6 / shape[1])
        assert 0.99 * bound < float(matrix.abs().max()) <= bound
        assert float(matrix.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_nothing_of_the_inputs_width_is_kept_for_backward(base: nn.Module) -> None:
    wrapped, x = wrap(base, dropout=0.3).train(), x_of(500, IN)
    saved = saved_storages(lambda: wrapped(x.float()))
    assert [t.shape for t in saved.values() if t.numel() >= 500] == [(500, R)]


def shared_of(model: nn.Module) -> list[tuple[int, int]]:
    return [(id(m.adapter.get_parameter("A")), id(m.adapter.get_parameter("B"))) for _, m in adapted(model)]


def test_all_sites_of_a_rule_share_one_pair_which_no_copy_or_cast_divides(model: Any) -> None:
    made = plan(model, {"all-linear": partial(VeRA, r=R)})
    apply(model, made, seed=3)
    for one in (model, copy.deepcopy(model), model.double()):
        assert len(set(shared_of(one))) == 1
    widest = [max(row.shape[side] for row in made.rows) for side in (0, 1)]
    assert (vera(next(m for _, m in adapted(model))).A.shape[1], widest[1]) == (widest[1], widest[1])
    assert {name.rpartition(".")[2] for name in named_trainable(model)} == {"b", "d"}
    assert sum(p.numel() for p in named_trainable(model).values()) == made.trainable_parameters
    assert made.trainable_parameters == sum(R + row.shape[0] for row in made.rows)
    kept = [name for name in adapter_state(model) if name.rpartition(".")[2] in ("A", "B")]
    assert kept == [f"{made.rows[0].path}.adapter.A", f"{made.rows[0].path}.adapter.B"]


def test_rules_with_other_options_share_another_pair(llama: nn.Module) -> None:
    apply(llama, plan(llama, {"q_proj": partial(VeRA, r=R), "v_proj": partial(VeRA, r=R + 1)}))
    assert len(set(shared_of(llama))) == 2


def test_a_model_with_it_is_saved_merged_and_undone(
    model: Any, make_llama: Any, make_gpt2: Any, tokens: Tensor, tmp_path: Path
) -> None:
    make = make_llama if type(model).__name__.startswith("Llama") else make_gpt2
    with torch.no_grad():
        bare = model(input_ids=tokens).logits
        apply(model, plan(model, {"all-linear": partial(VeRA, r=R)}), seed=3)
        for name, parameter in named_trainable(model).items():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=key(1, name)))
        after = model(input_ids=tokens).logits
        assert not torch.allclose(after, bare, atol=1e-2)
        save_adapter(model, tmp_path)
        again = load_adapter(make(), tmp_path)
        assert current_plan(again) == current_plan(model)
        assert len(set(shared_of(again))) == 1
        assert torch.equal(again(input_ids=tokens).logits, after)
        torch.testing.assert_close(merge(model)[0](input_ids=tokens).logits, after, rtol=0, atol=1e-4)
        assert torch.equal(remove(model)(input_ids=tokens).logits, bare)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "adapter.r: 0 is not allowed; a positive integer."),
        ({"d_initial": 0}, "adapter.d_initial: 0 is not allowed; a positive number."),
        ({"dropout": -0.1}, "adapter.dropout: -0.1 is not allowed; a number from 0 up to, but not including, 1."),
        ({"alpha": 16}, "adapter.alpha: unknown key. Allowed: r, d_initial, dropout."),
    ],
)
def test_a_bad_option_is_refused(options: dict[str, Any], said: str, llama: nn.Module) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(llama, {"q_proj": partial(VeRA, **options)})
    assert str(caught.value) == said


def test_it_goes_on_linear_layers_alone_and_passes_the_configurations_check(llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match="VeRA adapts linear sites only"):
        plan(llama, {"embedding": VeRA})
    check_adapter("lowrank.adapters.VeRA", "all-linear", {"r": 256, "d_initial": 0.1, "dropout": 0.0})
