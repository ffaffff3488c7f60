"""The plan: which adapter goes on which site, counted before any weight changes."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lowrank.adapters.base import Adapter, shape
from lowrank.adapters.sites import (
    EXCLUDE,
    KEYWORDS,
    WHERE,
    Pattern,
    count,
    kinds,
    matched,
    matched_parameters,
    matches,
    owners,
    parameters,
    show,
    site_kind,
    sites,
    suggestion,
    uncovered,
    within,
)
from lowrank.adapters.table import InjectionPlan, Row
from lowrank.errors import ConfigError, did_you_mean

__all__ = ["Factory", "InjectionPlan", "Row", "Rules", "class_and_options", "option_names", "plan", "resolve"]

Factory = Callable[..., Adapter]  # an Adapter class, or functools.partial of one with its options
Rules = Mapping[Any, Factory]  # by Pattern; Any, because a Mapping is invariant in its keys


def plan(model: nn.Module, rules: Rules, exclude: Sequence[Pattern] = ()) -> InjectionPlan:
    """What ``rules`` would put where, without changing ``model`` (which may be on the meta device).

    A pattern is a glob over paths (``*.q_proj``), a bare name (``q_proj``: the last part of a path), a regular
    expression (``re:layers\\.[0-3]\\..*``), a module class, or one of ``all-linear`` (every linear-like site but the
    head), ``embedding``, ``blocks`` and ``backbone``; ``@0-7,12`` behind a pattern limits it to those layers. A
    factory is an ``Adapter`` class or ``functools.partial`` of one. What ``exclude`` names, and what lies in it, is
    left out.

    Every adapter is built once over a stand-in without values, so the counts are true and a bad option raises
    here. Raises ConfigError where a pattern matches nothing, two patterns claim one site, a pattern matches only
    modules of a kind that the adapter does not take, or an option is unknown or out of range.
    """
    check_patterns(rules, exclude)
    left_out = {pattern: excluded(model, pattern) for pattern in exclude}
    claimed, meant = claims(model, rules, set().union(*left_out.values()))
    order = [*(path for path, _ in sites(model)), *parameters(model)]
    idle = [
        f"{EXCLUDE}: {show(one)} leaves out nothing that a target matches"
        for one in exclude
        if not meant & left_out[one]
    ]
    planned = tuple(claimed[path] for path in dict.fromkeys(order) if path in claimed)
    return InjectionPlan(planned, count(model), (*uncovered(model), *idle))


def check_patterns(rules: Rules, exclude: Sequence[Pattern]) -> None:
    if not isinstance(rules, Mapping):
        raise ConfigError(f"{WHERE}: {rules!r} is not allowed; a mapping, such as {{'q_proj': LoRA}}.")
    if isinstance(exclude, str):
        raise ConfigError(f"{EXCLUDE}: '{exclude}' is not allowed; a list of patterns.")
    for pattern in (*rules, *exclude):
        if not isinstance(pattern, (str, type)):
            raise ConfigError(f"{WHERE}: {pattern!r} is not a pattern; a text or a class of modules.")


def claims(model: nn.Module, rules: Rules, left_out: set[str]) -> tuple[dict[str, Row], set[str]]:
    """The rows by path, and every path that a rule matches, left out or not."""
    claimed: dict[str, tuple[Pattern, Row]] = {}
    twice: list[tuple[str, Pattern, Pattern]] = []
    meant: set[str] = set()
    methods = [class_and_options(factory) for factory in rules.values()]
    for pattern, (adapter, options) in zip(rules, methods, strict=True):
        found = targets(model, pattern, adapter)
        meant |= found.keys()
        kept = {path: one for path, one in found.items() if path not in left_out}
        if not kept:
            raise ConfigError(f"{WHERE}: everything that {show(pattern)} matches is in {EXCLUDE}.")
        try:
            made = list(rows(model, kept, adapter, options))
        except ValueError as error:
            where = "adapter" if all(method == methods[0] for method in methods) else f"{WHERE}[{show(pattern)}]"
            joint = "." if str(error).partition(":")[0].isidentifier() else ": "
            raise ConfigError(f"{where}{joint}{error}") from error
        except (RuntimeError, TypeError, OverflowError) as error:
            if "overflow" not in str(error).lower():
                raise
            raise ConfigError(f"{WHERE}: {adapter.__name__} with these options is larger than any memory.") from error
        twice += [(row.path, claimed[row.path][0], pattern) for row in made if row.path in claimed]
        claimed |= {row.path: (pattern, row) for row in made}
    if twice:
        path, first, second = twice[0]
        more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise ConfigError(f"{WHERE}: {show(first)} and {show(second)} both claim {path}{more}. One rule a site.")
    return {path: row for path, (_, row) in claimed.items()}, meant


def class_and_options(factory: Factory) -> tuple[type[Adapter], dict[str, Any]]:
    """The Adapter class and the keyword options of a rule's factory."""
    cls, options = (factory.func, dict(factory.keywords)) if isinstance(factory, partial) else (factory, {})
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise ConfigError(f"{WHERE}: {factory!r} is neither an Adapter class nor functools.partial of one.")
    if isinstance(factory, partial) and factory.args:
        raise ConfigError(f"{WHERE}: {cls.__name__}: {factory.args} is not allowed; options have names, such as r=8.")
    allowed = option_names(cls)
    for name in options:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise ConfigError(f"adapter.{name}: unknown key.{hint} Allowed: {', '.join(allowed) or 'none'}.")
    return cls, options


def option_names(cls: type[Adapter]) -> list[str]:
    """The options of a method: its constructor's keywords but the generator and what its sites share."""
    keywords = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return [name for name in keywords if name != "generator" and not name.startswith("shared_")]


def excluded(model: nn.Module, pattern: Pattern) -> set[str]:
    """Paths of the modules and of the base's parameters that a pattern names, and of all that lies in them."""
    everything = dict.fromkeys([path for path, _ in sites(model) if path] + list(parameters(model)))
    try:
        named = {*matched(model, pattern), *matched_parameters(model, pattern)}
    except ConfigError as error:
        raise ConfigError(str(error).replace(WHERE, EXCLUDE, 1)) from None
    if not named:
        raise ConfigError(f"{EXCLUDE}: {show(pattern)} matches no module.{suggestion(pattern, everything)}")
    return {path for path in everything if path in named or within(path, named)}


def targets(model: nn.Module, pattern: Pattern, adapter: type[Adapter]) -> dict[str, Any]:
    """The modules, or the base's parameters, that a rule is for, by path. Raises ConfigError where there are none."""
    if "parameter" in adapter.sites:
        return own_targets(model, pattern, adapter)
    known, kind, hits = dict(sites(model)), kinds(model), matched(model, pattern)
    if not hits:
        raise ConfigError(f"{WHERE}: {show(pattern)} matches no module.{suggestion(pattern, known)}")
    supported = {path: module for path, module in hits.items() if kind[path] in adapter.sites}
    if not supported:
        path, module = next(iter(hits.items()))
        meant = {path: module for path, module in known.items() if kind[path] in adapter.sites}
        names = [keyword for keyword, meaning in KEYWORDS.items() if meaning in adapter.sites]
        there = any(site_kind(one) != "other" for one in meant.values())
        hint = suggestion(pattern, meant) if there else f" Its targets: {', '.join(names)}."
        raise ConfigError(
            f"{WHERE}: {show(pattern)} matches {path} ({type(module).__name__}), but "
            f"{adapter.__name__} adapts {' and '.join(adapter.sites)} sites only.{hint}"
        )
    refuse_twins(model, pattern, supported)
    return supported


def refuse_twins(model: nn.Module, pattern: Pattern, found: Mapping[str, nn.Module]) -> None:
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for path, module in found.items():
        if places[id(module)] > 1:
            raise ConfigError(
                f"{WHERE}: {show(pattern)} matches {path}, a module that stands at {places[id(module)]} places of this "
                f"model, and an adapter would be at one of them."
            )


def own_targets(model: nn.Module, pattern: Pattern, adapter: type[Adapter]) -> dict[str, nn.Parameter]:
    own, modules = parameters(model), dict(sites(model))
    named = {path: own[path] for path in matched_parameters(model, pattern)}
    trained = {path: parameter for path, parameter in named.items() if matches(adapter.trains, path)}
    if trained:
        return trained
    if named:
        raise ConfigError(
            f"{WHERE}: {show(pattern)} matches {next(iter(named))}, but {adapter.__name__} trains '{adapter.trains}' "
            f"alone, and there is none among what it matches."
        )
    held = {id(p) for path in matched(model, pattern) for p in modules[path].parameters()}
    if tied := next((path for path, parameter in own.items() if id(parameter) in held), None):
        raise ConfigError(f"{WHERE}: {show(pattern)} has no parameter of its own: it is tied to {tied}.")
    dense = {path: parameter for path, parameter in own.items() if parameter.is_floating_point()}
    hint = suggestion(pattern, dense, dict.fromkeys(modules))
    raise ConfigError(f"{WHERE}: {show(pattern)} matches no parameter of this {type(model).__name__}.{hint}")


def rows(model: nn.Module, kept: dict[str, Any], adapter: type[Adapter], options: dict[str, Any]) -> Iterator[Row]:
    find = rows_of_parameters if "parameter" in adapter.sites else rows_of_sites
    return find(model, kept, adapter, options)


def rows_of_sites(
    model: nn.Module, modules: dict[str, nn.Module], adapter: type[Adapter], options: dict[str, Any]
) -> Iterator[Row]:
    shapes = {path: shape(module) for path, module in modules.items()}
    sizes = adapter_sizes(modules, shapes, adapter, options)
    for path, module in modules.items():
        # Of layers it is their parent; a block is the only one that reads its input.
        reader = path.rpartition(".")[0] if site_kind(module) != "other" else path
        yield Row(
            path=path,
            kind=type(module).__name__,
            shape=shapes[path],
            adapter=dotted(adapter),
            options=options,
            parameters=sizes[path],
            group=f"{reader}:{shapes[path][1]}",
        )


def rows_of_parameters(
    model: nn.Module, own: dict[str, nn.Parameter], adapter: type[Adapter], options: dict[str, Any]
) -> Iterator[Row]:
    """Rows of a method that trains the base's own parameters; NF4 weights cannot."""
    owner = owners(model)
    quantized = list(dict.fromkeys(p.rpartition(".")[0] for p in own if not own[p].is_floating_point()))
    if quantized:
        raise ConfigError(
            f"adapter: {adapter.__name__} trains the base's own weights, and NF4 weights cannot train "
            f"({len(quantized)} sites, first {quantized[0]}). Use quant=none, or an adapter such as lora."
        )
    for path, parameter in own.items():
        kind, size = type(owner[path]).__name__, tuple(parameter.shape)
        yield Row(path, kind, size, dotted(adapter), options, parameter.numel(), group=path)


def adapter_sizes(
    bases: Mapping[str, nn.Module],
    shapes: dict[str, tuple[int, int]],
    adapter: type[Adapter],
    options: dict[str, Any],
) -> dict[str, int]:
    """Builds each adapter over a stand-in without values and counts its trainable parameters.

    Raises ValueError, the constructor's, for an option that is out of range.
    """
    generator = torch.Generator("cpu")
    with torch.device("meta"):
        shared = adapter.shared(shapes, generator=generator, **options)
        built = {p: adapter(stand_in(b), generator=generator, **options, **shared) for p, b in bases.items()}
    return {path: sum(p.numel() for p in one.parameters() if p.requires_grad) for path, one in built.items()}


def stand_in(module: nn.Module) -> nn.Module:
    """The same module with parameters and buffers of the same shape that hold no values."""
    twin = copy.copy(module)
    twin._parameters = {
        name: p if p is None else nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for name, p in module._parameters.items()
    }
    twin._buffers = {
        name: b if b is None else torch.empty_like(b, device="meta") for name, b in module._buffers.items()
    }
    twin._modules = {name: m if m is None else stand_in(m) for name, m in module._modules.items()}
    return twin


def dotted(cls: type[Adapter]) -> str:
    """The shortest path that the class is imported by: what was saved still loads when a file moves in its package."""
    parts = cls.__module__.split(".")
    packages = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    home = next((p for p in packages if getattr(sys.modules.get(p), cls.__qualname__, None) is cls), cls.__module__)
    return f"{home}.{cls.__qualname__}"


def is_ours(name: str) -> bool:
    """Whether a dotted path is that of one of lowrank's own classes: to import any other may run any code."""
    return name.startswith("lowrank.adapters.")


def resolve(name: str) -> type[Adapter]:
    """The Adapter class that a plan's row names by its dotted path; one of ours, in whichever file it was then."""
    module, _, attribute = name.rpartition(".")
    module = "lowrank.adapters" if is_ours(name) else module
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"adapter class {name[:200]!r} is not a dotted path")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"adapter class {name} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise ConfigError(f"adapter class {name} is not a subclass of lowrank.adapters.Adapter")
    return cls
