"""Carrying out a plan: apply, remove, and the names of what trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank.adapters.bank import admit, enter, held, route_of
from lowrank.adapters.base import Adapted, Adapter, shape
from lowrank.adapters.plan import InjectionPlan, Row, dotted, resolve, stand_in
from lowrank.adapters.sites import TRAINED, adapted, count, parameters, replace, sites, uncovered
from lowrank.errors import ConfigError, RefusedError
from lowrank.keys import Clock, key

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    plan: InjectionPlan,
    seed: int = 0,
    clock: Clock | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    keep_base: bool = True,
    name: str | None = None,
) -> Model:
    """Freezes ``model`` and puts the plan's adapters on it, in place; returns it.

    Each adapter's initial values are keyed by its site's path, so adding a site changes no other; ``state``
    (``adapter_state`` of a trained model) takes their place. ``clock`` is the time that dropout masks depend on (the
    loop's); without one each forward draws new masks. Where the start changes the base (PiSSA), the original modules
    stay in memory for ``remove`` unless ``keep_base`` is false.

    With a ``name`` they stand beside the adapters that the model carries, which go on as they are (see
    ``lowrank.use``); the first one is the one in use.

    Raises ConfigError, with nothing changed, where the model already carries adapters (of that name) or is not the
    plan's, or where adapters with names would change the base; RefusedError where ``state`` is not the plan's.
    """
    if name is not None:
        admit(model, name)
    elif next(adapted(model), None) is not None:
        raise ConfigError(
            "apply: the model already carries adapters; lowrank.remove(model) takes them off, and with a name "
            "(name=…) another one stands beside them."
        )
    adapters = built(model, plan, seed, filled=state is not None)
    if name is not None:
        refuse_own_parameters(plan, name)  # before a value of the base is overwritten
    if state is not None:
        fill(state_of(model, plan, adapters), state)
    return (
        install(model, plan, adapters, clock, keep_base) if name is None else beside(model, plan, adapters, clock, name)
    )


def beside(model: Model, plan: InjectionPlan, adapters: dict[str, Adapter], clock: Clock | None, name: str) -> Model:
    """Puts the adapters under a name beside others, in place. They share the base, which so stays as it is."""
    bare = dict(sites(model))
    for row in plan.rows:
        with torch.no_grad():
            if adapters[row.path].rebased(bare[row.path]) is not bare[row.path]:
                raise changes_base(row, name)
    if next(adapted(model), None) is None:
        model.requires_grad_(False)
    for row in plan.rows:
        adapters[row.path].clock, adapters[row.path].group = clock or Adapter.clock, row.group
    enter(model, name, adapters, {row.path: row.options for row in plan.rows})
    return model


def refuse_own_parameters(plan: InjectionPlan, name: str) -> None:
    for row in plan.rows:
        if names_parameter(row):
            raise changes_base(row, name)


def changes_base(row: Row, name: str) -> ConfigError:
    return ConfigError(
        f"{row.path}: {row.method} changes the base itself, which adapters with names share: name={name} is not "
        f"possible."
    )


def built(model: nn.Module, plan: InjectionPlan, seed: int, *, filled: bool = False) -> dict[str, Adapter]:
    """The plan's adapters by path, not yet on the model, which is checked to be the plan's and is not changed.

    ``filled``: their values will be given, so what would be read off the weights need not be.
    """
    refuse_other_model(model, plan)
    bare = dict(sites(model))
    wrapped = [row for row in plan.rows if not names_parameter(row)]
    shared = shared_options(wrapped, seed)
    adapters = {row.path: build(row, bare[row.path], seed, shared[method(row)], filled) for row in wrapped}
    for row in plan.rows:
        site = row.path.rpartition(".")[0]
        if names_parameter(row) and site in adapters:
            refuse_two_bases(row, bare[site], adapters[site])
    return adapters


def refuse_other_model(model: nn.Module, plan: InjectionPlan) -> None:
    bare, own = dict(sites(model)), parameters(model)
    for row in plan.rows:
        found = own.get(row.path) if names_parameter(row) else bare.get(row.path)
        what = "parameter" if names_parameter(row) else "site"
        if found is None or (tuple(found.shape) if isinstance(found, Tensor) else shape_or_none(found)) != row.shape:
            raise ConfigError(f"apply: the plan's {row.path} {row.shape} is not a {what} of this model.")


@torch.no_grad()
def refuse_two_bases(row: Row, base: nn.Module, adapter: Adapter) -> None:
    """A weight that the start of its site's adapter replaces cannot train itself: it would be lost."""
    if adapter.rebased(base) is not base:
        raise ConfigError(
            f"adapter.targets: {row.path} trains itself, but {type(adapter).__name__} with these options starts from "
            f"it and replaces it. Leave one of the two out, or choose another start."
        )


def install(
    model: Model, plan: InjectionPlan, adapters: dict[str, Adapter], clock: Clock | None = None, keep: bool = True
) -> Model:
    """Freezes the model, sets what trains, and wraps each site with its adapter, in place."""
    bare, own = dict(sites(model)), parameters(model)
    model.requires_grad_(False)
    for row in plan.rows:
        if names_parameter(row):
            own[row.path].requires_grad_(True)
            continue
        adapter, original = adapters[row.path], bare.pop(row.path)
        adapter.clock, adapter.group = clock or Adapter.clock, row.group
        with torch.no_grad():
            base = adapter.rebased(original)
        if base is not original:
            base.requires_grad_(False)
        kept = (original,) if keep or base is original else ()
        replace(model, row.path, Adapted(base, adapter, row.options, kept))
    vars(model)[TRAINED] = tuple(row for row in plan.rows if names_parameter(row))
    return model


def names_parameter(row: Row) -> bool:
    """Whether a row is of a method that trains a parameter of the base, rather than of one that wraps a site."""
    return "parameter" in resolve(row.adapter).sites


def shape_or_none(module: nn.Module) -> tuple[int, int] | None:
    try:
        return shape(module)
    except TypeError:
        return None


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
            generator=key(seed, "shared", what[0]),
            **group[0].options,
        )
        for what, group in groups.items()
    }


def build(row: Row, base: nn.Module, seed: int, shared: dict[str, Any], filled: bool) -> Adapter:
    cls = resolve(row.adapter)
    make = partial(cls, generator=key(seed, "init", row.path), **row.options, **shared)
    device = next((p.device for p in base.parameters()), torch.device("cpu"))
    if filled and not shared and cls.rebased is not Adapter.rebased:  # its start may take a decomposition of W
        adapter: Adapter = make(stand_in(base))
        if not any(module._non_persistent_buffers_set for module in adapter.modules()):
            return adapter.to_empty(device=device)
    return make(base).to(device)


def remove(model: Model) -> Model:
    """Puts the original module objects back, in place. The base stays frozen and keeps its values."""
    wrapped, route = list(adapted(model)), route_of(model)
    lost = [path for path, module in wrapped if module.original is None]
    if lost:
        raise ConfigError(
            f"remove: {lost[0]} and {len(lost) - 1} more: the start of their adapters changed the base, and the "
            f"original was not kept (keep_base=False). Load the base again."
        )
    for path, module in reversed(wrapped):  # what lies within a wrapped backbone first
        assert module.original is not None
        replace(model, path, module.original)
    if route is not None:
        route.release(model)
    vars(model).pop(TRAINED, None)
    return model.requires_grad_(False)


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that requires grad, by the bare model's names: ``….q_proj.adapter.A``, or ``….q_proj.weight``."""
    found = {name: p for name, p in parameters(model).items() if p.requires_grad}
    for path, module in adapted(model):
        for name, parameter in module.adapter.named_parameters():
            if parameter.requires_grad:
                found[f"{path}.adapter.{name}"] = parameter
    return found


def adapter_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """What an adapter file holds: parameters and persistent buffers of every adapter, and the base's own
    parameters that train, by the bare model's names. Of one of several adapters: by the names it has alone."""
    if name is not None:
        return named_state({path: one.adapter for path, one in held(model, name).items()})
    state: dict[str, Tensor] = {n: p for n, p in parameters(model).items() if p.requires_grad}
    return state | named_state({path: module.adapter for path, module in adapted(model)})


def named_state(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Parameters and persistent buffers by full name; a tensor that several adapters hold, under its first one."""
    state: dict[int, tuple[str, Tensor]] = {}
    for path, adapter in adapters.items():
        for name, tensor in adapter.state_dict(keep_vars=True).items():
            state.setdefault(id(tensor), (f"{path}.adapter.{name}", tensor))
    return dict(state.values())


def state_of(model: nn.Module, plan: InjectionPlan, adapters: dict[str, Adapter]) -> dict[str, Tensor]:
    """What ``adapter_state`` will be once the plan is carried out."""
    own = parameters(model)
    return {row.path: own[row.path] for row in plan.rows if row.path not in adapters} | named_state(adapters)


def fill(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies ``tensors`` into ``state``; every name and shape must be met, and nothing more, or nothing is copied."""
    refuse_misfits(*({name: tuple(t.shape) for name, t in held.items()} for held in (state, tensors)))
    for name, tensor in tensors.items():
        state[name].detach().copy_(tensor)


def refuse_misfits(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises RefusedError where names or shapes differ."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        what = "is missing" if missing else "is not part of the plan"
        raise RefusedError(f"{(missing or extra)[0][:200]} {what} ({len(missing + extra)} such).")
    for name, size in found.items():
        if size != wanted[name]:
            raise RefusedError(f"{name} has shape {size}, not {wanted[name]}.")


def current_plan(model: nn.Module, name: str | None = None) -> InjectionPlan:
    """The plan that the model carries, read off its adapters: of the named one, or of the only one."""
    rows = [
        Row(
            path=path,
            kind=type(one.site.base if one.site.original is None else one.site.original).__name__,
            shape=shape(one.site.base),
            adapter=dotted(type(one.adapter)),
            options=one.options,
            parameters=sum(p.numel() for p in one.adapter.parameters() if p.requires_grad),
            group=one.adapter.group,
        )
        for path, one in held(model, name).items()
    ]
    rows += getattr(model, TRAINED, ())
    return InjectionPlan(tuple(rows), count(model), uncovered(model))


def hooks(model: nn.Module, steps: int) -> list[Any]:
    """What each method on the model, with each set of its options, does over time, for a run of ``steps``; of a
    frozen adapter nothing."""
    route = route_of(model)
    made = [hook for name in (route.resident if route else [None]) for hook in hooks_of(model, name, steps)]
    return [hook for hook in made if hook is not None]


def hooks_of(model: nn.Module, name: str | None, steps: int) -> Iterator[Any | None]:
    carried = {path: one.adapter for path, one in held(model, name).items()}
    methods: dict[tuple[str, str], dict[str, Adapter]] = {}
    for row in current_plan(model, name).rows:
        if row.path in carried and row.parameters:
            methods.setdefault(method(row), {})[row.path] = carried[row.path]
    return (type(next(iter(group.values()))).hook(group, steps=steps) for group in methods.values())
