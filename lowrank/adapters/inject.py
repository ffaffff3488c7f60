"""Carrying out a plan: apply, remove, and the names of what trains."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapted, Adapter, shape
from lowrank.adapters.full import Full
from lowrank.adapters.plan import InjectionPlan, Row, dotted, resolve
from lowrank.adapters.sites import adapted, count, owners, parameters, site_kind, sites, uncovered
from lowrank.errors import ConfigError
from lowrank.keys import Clock, key

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, plan: InjectionPlan, seed: int = 0, clock: Clock | None = None) -> Model:
    """Freezes ``model`` and puts the plan's adapters on it, in place; returns it.

    Each adapter's initial values are keyed by its site's path, so adding a site changes no other. ``clock``
    is the time that dropout masks depend on (the loop's); without one each forward draws new masks.

    Raises ConfigError, with nothing changed, where the model already carries adapters or is not the plan's.
    """
    return install(model, plan, built(model, plan, seed), clock)


def built(model: nn.Module, plan: InjectionPlan, seed: int) -> dict[str, Adapter]:
    """The plan's adapters by path, not yet on the model, which is checked to be the plan's and is not changed."""
    if next(adapted(model), None) is not None:
        raise ConfigError("apply: the model already carries adapters; lowrank.remove(model) takes them off.")
    bare, own = dict(sites(model)), parameters(model)
    wrapped = [row for row in plan.rows if not names_parameter(row)]
    for row in plan.rows:
        found = own.get(row.path) if names_parameter(row) else bare.get(row.path)
        what = "parameter" if names_parameter(row) else "site"
        if found is None or (tuple(found.shape) if isinstance(found, Tensor) else shape_or_none(found)) != row.shape:
            raise ConfigError(f"apply: the plan's {row.path} {row.shape} is not a {what} of this model.")
    shared = shared_options(wrapped, seed)
    return {row.path: build(row, bare[row.path], seed, shared[method(row)]) for row in wrapped}


def install(model: Model, plan: InjectionPlan, adapters: dict[str, Adapter], clock: Clock | None = None) -> Model:
    """Freezes the model, sets what trains, and wraps each site with its adapter, in place."""
    bare, own = dict(sites(model)), parameters(model)
    model.requires_grad_(False)
    for row in plan.rows:
        if names_parameter(row):
            own[row.path].requires_grad_(True)
            continue
        adapter = adapters[row.path]
        adapter.clock, adapter.group = clock or Adapter.clock, row.group
        replace(model, row.path, Adapted(bare[row.path], adapter, row.options))
    return model


def names_parameter(row: Row) -> bool:
    """Whether a row is of a method that trains a parameter of the base, rather than of one that wraps a site."""
    return "parameter" in resolve(row.adapter).sites


def shape_or_none(module: nn.Module) -> tuple[int, int] | None:
    return None if site_kind(module) == "other" else shape(module)


def method(row: Row) -> tuple[str, str]:
    """Rows of one method with the same options share what the method shares."""
    return row.adapter, repr(sorted(row.options.items()))


def shared_options(rows: list[Row], seed: int) -> dict[tuple[str, str], dict[str, Any]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(method(row), []).append(row)
    return {
        what: resolve(what[0]).shared(
            {row.path: (row.shape[0], row.shape[1]) for row in group},
            generator=key(seed, "shared", *what),
            **group[0].options,
        )
        for what, group in groups.items()
    }


def build(row: Row, base: nn.Module, seed: int, shared: dict[str, Any]) -> Adapter:
    adapter = resolve(row.adapter)(base, generator=key(seed, "init", row.path), **row.options, **shared)
    device = next((p.device for p in base.parameters()), torch.device("cpu"))
    return adapter.to(device)


def remove(model: Model) -> Model:
    """Puts the original module objects back, in place. The base stays frozen and keeps its values."""
    for path, module in list(adapted(model)):
        replace(model, path, module.base)
    return model.requires_grad_(False)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Sets the module at a bare path, through whatever is wrapped on the way there."""
    parent: nn.Module = model
    *parents, name = path.split(".")
    for part in parents:
        child = getattr(parent, part)
        parent = child.base if isinstance(child, Adapted) else child
    setattr(parent, name, module)


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that requires grad, by the bare model's names: ``….q_proj.adapter.A``, or ``….q_proj.weight``."""
    found = {name: p for name, p in parameters(model).items() if p.requires_grad}
    for path, module in adapted(model):
        for name, parameter in module.adapter.named_parameters():
            if parameter.requires_grad:
                found[f"{path}.adapter.{name}"] = parameter
    return found


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter file holds: parameters and persistent buffers of every adapter, and the base's own
    parameters that train, by the bare model's names."""
    state: dict[str, Tensor] = {n: p for n, p in parameters(model).items() if p.requires_grad}
    for path, module in adapted(model):
        for name, tensor in module.adapter.state_dict(keep_vars=True).items():
            state[f"{path}.adapter.{name}"] = tensor
    return state


def current_plan(model: nn.Module) -> InjectionPlan:
    """The plan that the model carries, read off its adapters."""
    owner = owners(model)
    rows = [
        Row(
            path=path,
            kind=type(module.base).__name__,
            shape=shape(module.base),
            adapter=dotted(type(module.adapter)),
            options=module.options,
            parameters=sum(p.numel() for p in module.adapter.parameters() if p.requires_grad),
            group=module.adapter.group,
        )
        for path, module in adapted(model)
    ]
    rows += [
        Row(path, type(owner[path]).__name__, tuple(p.shape), dotted(Full), {}, p.numel(), path)
        for path, p in parameters(model).items()
        if p.requires_grad
    ]
    return InjectionPlan(tuple(rows), count(model), uncovered(model))


def hooks(model: nn.Module, steps: int) -> list[Any]:
    """What each method on the model does over time, for a run of ``steps``."""
    methods: dict[type[Adapter], dict[str, Adapter]] = {}
    for path, module in adapted(model):
        methods.setdefault(type(module.adapter), {})[path] = module.adapter
    made = (cls.hook(adapters, steps=steps) for cls, adapters in methods.items())
    return [hook for hook in made if hook is not None]
