"""How an adapter begins: what it is made of, what it does before training, and where its numbers come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapted
from lowrank.adapters.inject import apply, current_plan, named_trainable
from lowrank.adapters.plan import InjectionPlan
from lowrank.adapters.preflight import check_gradients
from lowrank.adapters.sites import adapted
from lowrank.errors import ConfigError
from lowrank.testing.bases import Base, dense, tokens
from lowrank.testing.trial import HOLDS, SEED, Outcome, Trial, differing, fails, far, logits, not_promised, values


def construction(trial: Trial) -> Outcome:
    """It is built over a stand-in without values as over the weights, in fp32, and keeps nothing of its base."""
    planned = trial.plan(trial.base.fresh())
    model = trial.wrapped()
    for path, module in adapted(model):
        kept = next(of_the_base(module), None)
        if kept is not None:
            return fails(f"{path}: the adapter keeps its base, as {kept}; it is given to every call")
        wide = [n for n, p in module.adapter.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if wide:
            return fails(f"{path}: {wide[0]} is not fp32, as what trains must be")
    for row, found in zip(planned.rows, current_plan(model).rows, strict=True):
        if row != found:
            return fails(
                f"{row.path}: planned over a stand-in without values it has {row.parameters:,} parameters, "
                f"built over the weights {found.parameters:,}"
            )
    return HOLDS


def of_the_base(module: Adapted) -> Iterator[str]:
    """Names under which an adapter holds its base, a part of it, or a tensor of it."""
    base = {id(part) for part in (*module.base.modules(), *module.base.parameters(), *module.base.buffers())}
    adapter = module.adapter
    held: list[tuple[str, Any]] = [*adapter.named_modules(), *adapter.named_parameters(), *adapter.named_buffers()]
    yield from (name for name, part in [*held, *vars(adapter).items()] if id(part) in base)


def identity(trial: Trial) -> Outcome:
    """Wrapped equals base before training: bit for bit, or within one rounding of how the base is stored."""
    before, model = logits(trial.base.fresh()), trial.wrapped()
    promised: set[Any] = {module.adapter.identity_at_start for _, module in adapted(model)}
    strange = promised - {True, False, "rounding"}
    if strange:
        return fails(f"identity_at_start is {strange.pop()!r}; True, False or 'rounding'")
    if False in promised:
        return not_promised("identity_at_start is False")
    after = logits(model)
    if "rounding" in promised:
        apart = far(after, before, rounding(trial.base, before))
        return fails(f"{apart}, though identity_at_start is 'rounding'") if apart else HOLDS
    apart = far(after, before, 0.0)
    return fails(f"{apart} in the logits, though identity_at_start is True") if apart else HOLDS


def rounding(base: Base, before: Tensor) -> float:
    """What storing a weight anew may change, of the largest logit: fp32's rounding; over NF4, as much again as
    quantising the dense weights has."""
    if base.model != "nf4":
        return 1e-4
    unquantised = logits(dense(base.model))
    return 2 * float((before - unquantised).abs().max() / before.abs().max())


def trainable(trial: Trial) -> Outcome:
    """Exactly the planned parameters require grad, before a pass and after it, and each adapter gets a gradient."""
    model = trial.wrapped()
    wrong = other_than_planned(model, trial.planned)
    if wrong:
        return fails(wrong)
    model(input_ids=tokens()).logits.square().mean().backward()
    wrong = other_than_planned(model, trial.planned)
    if wrong:
        return fails(f"after a forward and a backward pass {wrong}")
    try:
        check_gradients(model)
    except ConfigError as error:
        return fails(str(error).removeprefix("pre-flight: "))
    without = [name for name, p in named_trainable(model).items() if ".adapter." not in name and p.grad is None]
    return fails(f"{without[0]} gets no gradient") if without else HOLDS


def other_than_planned(model: nn.Module, planned: InjectionPlan) -> str | None:
    """How what requires grad is not what the plan says, or None."""
    names = named_trainable(model)
    own = {id(p) for p in names.values()}
    places = {name.partition(".adapter.")[0] for name in names}
    rows = {row.path for row in planned.rows if row.parameters}
    stray = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    extra, missing = sorted(places - rows) + stray, sorted(rows - places)
    if extra:
        return f"{extra[0]} requires grad, which is not planned ({len(extra)} such)"
    if missing:
        return f"nothing at {missing[0]} requires grad ({len(missing)} such)"
    total = sum(p.numel() for p in names.values())
    if total != planned.trainable_parameters:
        return f"{total:,} parameters require grad, and {planned.trainable_parameters:,} are planned"
    return None


def seeds(trial: Trial) -> Outcome:
    """The same seed gives the same start, and nothing is drawn from torch's default generator."""
    models = [trial.base.fresh(), trial.base.fresh()]
    before = torch.get_rng_state()
    first = values(trial.wrapped(models[0]))
    if not torch.equal(torch.get_rng_state(), before):
        return fails("the constructor draws from torch's default generator, not from the one it is given")
    torch.rand(1)  # whatever is drawn in between
    other = differing(first, values(trial.wrapped(models[1])))
    return fails(f"{other} starts with other values under the same seed") if other else HOLDS


def independent(trial: Trial) -> Outcome:
    """A site starts with the same values whichever other sites the plan has."""
    start, rows = values(trial.wrapped()), trial.planned.rows
    chosen = rows[len(rows) // 2]
    alone = InjectionPlan((chosen,), trial.planned.total_parameters)
    found = named_trainable(apply(trial.base.fresh(), alone, SEED))
    for name, parameter in found.items():
        if name not in start or not torch.equal(parameter, start[name]):
            return fails(f"{name} starts with other values where {chosen.path} is the only site")
    return HOLDS
