"""AdaLoRA's budget: how it falls, who gets it, that it is exact, and that its state is all there is to resume."""

from __future__ import annotations

import copy
from fractions import Fraction
from math import floor
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from lowrank.adapters import AdaLoRA
from lowrank.adapters.methods.budget import Schedule
from lowrank.keys import key

SHAPES = {"q": (12, 16), "v": (6, 16), "up": (20, 10)}
STEPS, INIT, TARGET = 20, 5, 2  # t_i = 2, T − t_f = 14
SITES = len(SHAPES)


def adapters_of(**options: Any) -> dict[str, Any]:
    """Three sites of unlike shapes in fp64."""
    chosen = {"init_r": INIT, "target_r": TARGET, "tinit": 0.1, "tfinal": 0.3, "delta_t": 3, **options}
    return {
        path: AdaLoRA(nn.Linear(into, out), generator=key(0, path), **chosen).double()
        for path, (out, into) in SHAPES.items()
    }


def parameters(adapters: dict[str, Any]) -> dict[str, nn.Parameter]:
    return {f"{path}.{name}": p for path, one in adapters.items() for name, p in one.named_parameters()}


def draw(adapters: dict[str, Any], step: int, values: bool = True) -> None:
    """Gradients, and values too, keyed by step."""
    for name, parameter in parameters(adapters).items():
        if values:
            parameter.data.normal_(generator=key(step, "value", name))
        parameter.grad = torch.randn(parameter.shape, generator=key(step, "grad", name), dtype=parameter.dtype)


def count(adapters: dict[str, Any]) -> int:
    return sum(int((one.E != 0).sum()) for one in adapters.values())


@pytest.mark.parametrize(("steps", "first", "last"), [(20, 2, 14), (100, 10, 70), (1000, 0, 1000), (3, 1, 2)])
@pytest.mark.parametrize(("start", "end"), [(15, 6), (5040, 3360), (7, 7)])
def test_the_budget_is_the_paper_s_cubic(steps: int, first: int, last: int, start: int, end: int) -> None:
    schedule = Schedule(steps, first, last, 1, start, end)
    for step in range(1, steps + 1):
        share = 1 - Fraction(step - first, last - first)
        wanted = start if step <= first else end if step >= last else floor(end + (start - end) * share**3)
        assert schedule.budget(step) == wanted, step


def test_it_is_given_out_every_delta_t_steps_after_t_i_and_last_at_t_minus_t_f() -> None:
    schedule = AdaLoRA.hook(adapters_of(), steps=STEPS).schedule
    assert [step for step in range(1, STEPS + 1) if schedule.due(step)] == [5, 8, 11, 14]
    schedule = AdaLoRA.hook(adapters_of(delta_t=5), steps=STEPS).schedule
    assert [step for step in range(1, STEPS + 1) if schedule.due(step)] == [7, 12, 14]
    schedule = AdaLoRA.hook(adapters_of(delta_t=None), steps=1000).schedule
    assert len([step for step in range(1, 1001) if schedule.due(step)]) == 20


@pytest.mark.parametrize("parts", [(0.1, 0.3), (0.0, 0.0), (0.5, 0.49), (0.0, 0.99), (0.99, 0.0)], ids=str)
def test_a_run_of_any_length_ends_with_exactly_the_target(parts: tuple[float, float]) -> None:
    for steps in (*range(1, 40), 999):
        adapters = adapters_of(tinit=parts[0], tfinal=parts[1], delta_t=None)
        hook = AdaLoRA.hook(adapters, steps=steps)
        for step in range(1, steps + 1):
            draw(adapters, step % 7)
            hook.before_update(step)
            hook.after_update(step)
        assert sum(hook.ranks().values()) == count(adapters) == TARGET * SITES, steps


def test_the_most_important_triplets_stay_by_the_paper_s_scores() -> None:
    """Computed triplet by triplet, in plain numbers."""
    adapters = adapters_of(beta1=0.7, beta2=0.9)
    hook = AdaLoRA.hook(adapters, steps=STEPS)
    smooth: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in parameters(adapters).items()}
    unsure = copy.deepcopy(smooth)
    for step in range(1, 6):
        draw(adapters, step)
        for name, p in parameters(adapters).items():
            assert p.grad is not None
            now = (p.detach() * p.grad).abs()
            smooth[name] = 0.7 * smooth[name] + 0.3 * now
            unsure[name] = 0.9 * unsure[name] + 0.1 * (now - smooth[name]).abs()
        hook.before_update(step)
        hook.after_update(step)
    scores = {}
    for path, (out, into) in SHAPES.items():
        s = {name: smooth[f"{path}.{name}"] * unsure[f"{path}.{name}"] for name in "AEB"}
        for i in range(INIT):
            row = sum(float(s["A"][i, j]) for j in range(into)) / into
            column = sum(float(s["B"][j, i]) for j in range(out)) / out
            scores[path, i] = float(s["E"][i]) + row + column
    for found, path in zip(hook.scores(), SHAPES, strict=True):
        assert found.tolist() == pytest.approx([scores[path, i] for i in range(INIT)], rel=1e-12)
    budget = floor(6 + 9 * Fraction(3, 4) ** 3)
    best = set(sorted(scores, key=lambda triplet: -scores[triplet])[:budget])
    assert {(path, i) for path in SHAPES for i in range(INIT) if adapters[path].E[i] != 0} == best
    assert hook.ranks() == {path: sum(site == path for site, _ in best) for path in SHAPES}


def test_the_same_triplets_stay_as_with_peft_s_allocator_called_by_hand() -> None:
    model = nn.ModuleDict({path: nn.Linear(into, out, bias=False) for path, (out, into) in SHAPES.items()})
    options = AdaLoraConfig(
        init_r=INIT, target_r=TARGET, tinit=2, tfinal=6, deltaT=2, total_step=STEPS, target_modules=list(SHAPES)
    )
    theirs = get_peft_model(model, options).double().base_model
    adapters = adapters_of(delta_t=2)
    hook = AdaLoRA.hook(adapters, steps=STEPS)
    for step in range(1, 14):  # at 14, the last reallocation, PEFT leaves the step's own importance out
        draw(adapters, step)
        for path, one in adapters.items():
            layer = theirs.model[path]
            for name, held in (("A", layer.lora_A), ("E", layer.lora_E), ("B", layer.lora_B)):
                own, other = getattr(one, name), held["default"]
                other.data = own.data.view(other.shape).clone()
                other.grad = own.grad.view(other.shape).clone()
        hook.before_update(step)
        hook.after_update(step)
        theirs.update_and_allocate(step)
        if step > 2 and step % 2 == 0:
            kept = {path: (theirs.model[path].lora_E["default"] != 0).flatten().tolist() for path in SHAPES}
            assert {path: (one.E != 0).tolist() for path, one in adapters.items()} == kept, step
    assert sum(hook.ranks().values()) < INIT * SITES


@pytest.mark.parametrize("gradient", [0.0, 1.0], ids=["all zero", "all equal"])
def test_ties_and_zeros_do_not_break_the_count(gradient: float) -> None:
    adapters = adapters_of()
    hook = AdaLoRA.hook(adapters, steps=STEPS)
    for step in range(1, 15):
        for parameter in parameters(adapters).values():
            parameter.data.fill_(1.0)
            parameter.grad = torch.full_like(parameter, gradient)
        hook.before_update(step)
        hook.after_update(step)
    assert hook.ranks() == {"q": INIT, "v": 1, "up": 0}  # ties go to the earlier site
    assert count(adapters) == TARGET * SITES


def test_a_site_without_a_gradient_this_step_counts_as_unimportant() -> None:
    adapters = adapters_of()
    hook = AdaLoRA.hook(adapters, steps=STEPS)
    for step in range(1, 15):
        draw(adapters, step)
        for parameter in adapters["v"].parameters():
            parameter.grad = None
        hook.before_update(step)
        hook.after_update(step)
    assert hook.ranks()["v"] == 0


def adam(adapters: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters(adapters).values(), lr=0.1, weight_decay=0.1)


def train(adapters: dict[str, Any], hook: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[dict[str, int]]:
    """As the loop does it; how many entries of E are not zero after each step."""
    found = []
    for step in steps:
        draw(adapters, step, values=False)
        hook.before_update(step)
        optimizer.step()
        hook.after_update(step)
        found.append({path: int((one.E != 0).sum()) for path, one in adapters.items()})
    return found


def test_what_is_pruned_moves_between_reallocations_and_stays_zero_after_the_last() -> None:
    adapters = adapters_of()
    hook = AdaLoRA.hook(adapters, steps=STEPS)
    after = [sum(found.values()) for found in train(adapters, hook, adam(adapters), range(1, STEPS + 1))]
    budgets = [hook.schedule.budget(step) for step in range(1, STEPS + 1)]
    assert [after[step - 1] for step in (5, 8, 11)] == [budgets[step - 1] for step in (5, 8, 11)]
    assert [after[step - 1] for step in (6, 7, 9, 10, 12, 13)] == [INIT * SITES] * 6  # Adam has moved them all
    assert after[13:] == [TARGET * SITES] * 7
    assert all(not one.E[pruned].any() for one, pruned in zip(adapters.values(), hook.pruned, strict=True))


def test_a_triplet_may_come_back_before_the_last_reallocation() -> None:
    adapters = adapters_of()
    hook, optimizer = AdaLoRA.hook(adapters, steps=STEPS), adam(adapters)
    train(adapters, hook, optimizer, range(1, 6))
    lost = hook.pruned.clone()
    assert lost.any()
    for step in range(6, 9):
        draw(adapters, step, values=False)
        for one, pruned in zip(adapters.values(), lost, strict=True):
            one.E.grad[pruned] *= 1000  # what was pruned has come to matter
        hook.before_update(step)
        optimizer.step()
        hook.after_update(step)
    assert (lost & ~hook.pruned).any()


@pytest.mark.parametrize("at", [1, 6, 8, 13, 14, 17])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(at: int) -> None:
    whole = adapters_of()
    hook, optimizer = AdaLoRA.hook(whole, steps=STEPS), adam(whole)
    train(whole, hook, optimizer, range(1, at + 1))
    now = (hook.state_dict(), optimizer.state_dict(), {name: p.data for name, p in parameters(whole).items()})
    state, moments, values = copy.deepcopy(now)
    train(whole, hook, optimizer, range(at + 1, STEPS + 1))
    again = adapters_of()
    resumed, optimizer_again = AdaLoRA.hook(again, steps=STEPS), adam(again)
    resumed.load_state_dict(state)
    optimizer_again.load_state_dict(moments)
    for name, parameter in parameters(again).items():
        parameter.data.copy_(values[name])
    train(again, resumed, optimizer_again, range(at + 1, STEPS + 1))
    assert all(torch.equal(p, parameters(whole)[name]) for name, p in parameters(again).items())
    assert resumed.state_dict().keys() == hook.state_dict().keys()
    assert all(torch.equal(value, hook.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_state_of_other_sites_is_refused() -> None:
    hook = AdaLoRA.hook(adapters_of(), steps=STEPS)
    state = hook.state_dict()
    state.pop("importance.up.E")
    with pytest.raises(ValueError, match=r"importance\.up\.E"):
        hook.load_state_dict(state)


def test_a_run_made_shorter_on_resume_than_its_pruning_still_ends_with_the_target() -> None:
    adapters = adapters_of()
    hook, optimizer = AdaLoRA.hook(adapters, steps=STEPS), adam(adapters)
    train(adapters, hook, optimizer, range(1, 10))
    shorter = AdaLoRA.hook(adapters, steps=11)  # whose last reallocation would have been at step 8
    shorter.load_state_dict(hook.state_dict())
    after = train(adapters, shorter, optimizer, range(10, 12))
    assert [sum(found.values()) for found in after] == [TARGET * SITES] * 2
