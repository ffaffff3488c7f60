"""The plan: which adapter goes on which site, counted before any weight changes."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lowrank.adapters.base import Adapter, shape
from lowrank.adapters.sites import (
    WHERE,
    Pattern,
    count,
    kinds,
    layer_range,
    matched,
    matches,
    owners,
    parameters,
    show,
    sites,
    suggestion,
    uncovered,
)
from lowrank.errors import ConfigError, did_you_mean

Factory = Callable[..., Adapter]  # an Adapter class, or functools.partial of one with its options
Rules = Mapping[Any, Factory]  # by Pattern; Any, because a Mapping is invariant in its keys


@dataclass(frozen=True)
class Row:
    """One site of a plan (or, for ``Full``, one parameter of the base)."""

    path: str
    kind: str  # the module's class
    shape: tuple[int, ...]  # (out, in)
    adapter: str  # dotted path of the class
    options: dict[str, Any]
    parameters: int
    group: str  # sites of a group share their dropout mask

    @property
    def method(self) -> str:
        return self.adapter.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class InjectionPlan:
    """An ordered table of sites. ``print(plan)`` shows it; ``to_dict`` and ``from_dict`` are its JSON form."""

    rows: tuple[Row, ...]
    total_parameters: int  # of the base
    notes: tuple[str, ...] = ()  # what it does not cover

    @property
    def trainable_parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        cells = [("path", "kind", "shape", "adapter", "parameters")]
        for row in self.rows:
            options = ", ".join(f"{name}={value}" for name, value in row.options.items())
            method = f"{row.method}({options})" if options else row.method
            dimensions = "×".join(str(n) for n in row.shape)
            cells.append((row.path, row.kind, dimensions, method, f"{row.parameters:,}"))
        widths = [max(len(line[i]) for line in cells) for i in range(5)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(line[:4], widths, strict=False)), line[4].rjust(widths[4])])
            for line in cells
        ]
        total, base = self.trainable_parameters, self.total_parameters
        lines.append(
            f"{len(self.rows)} rows, {total:,} trainable parameters ({4 * total / 2**20:.1f} MiB in fp32), "
            f"{100 * total / max(base, 1):.2f} % of the base's {base:,}"
        )
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [vars(row) | {"shape": list(row.shape)} for row in self.rows],
            "total_parameters": self.total_parameters,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> InjectionPlan:
        rows = tuple(Row(**(row | {"shape": tuple(row["shape"])})) for row in data["rows"])
        for row in rows:
            if not (isinstance(row.path, str) and isinstance(row.adapter, str) and isinstance(row.options, dict)):
                raise TypeError(f"a row is {row}")
        return cls(rows, data["total_parameters"], tuple(data["notes"]))


def plan(model: nn.Module, rules: Rules, exclude: Sequence[Pattern] = ()) -> InjectionPlan:
    """What ``rules`` would put where, without changing ``model`` (which may be on the meta device).

    A pattern is a glob over paths (``*.q_proj``), a bare name (``q_proj``: the last part of a path), a regular
    expression (``re:layers\\.[0-3]\\..*``), a module class, or one of ``all-linear`` (every linear-like site but the
    head), ``embedding``, ``blocks`` and ``backbone``; ``@0-7,12`` behind a pattern limits it to those layers. A
    factory is an ``Adapter`` class or ``functools.partial`` of one. What ``exclude`` names is left out.

    Every adapter is built once over a stand-in without values, so the counts are true and a bad option raises
    here. Raises ConfigError where a pattern matches nothing, two patterns claim one site, a pattern matches only
    modules of a kind that the adapter does not take, or an option is unknown or out of range.
    """
    left_out = excluded(model, exclude)
    claimed: dict[str, tuple[Pattern, Row]] = {}
    twice: list[tuple[str, Pattern, Pattern]] = []
    for pattern, factory in rules.items():
        adapter, options = class_and_options(factory)
        find = rows_of_parameters if "parameter" in adapter.sites else rows_of_sites
        for row in find(model, pattern, adapter, options, left_out):
            if row.path in claimed:
                twice.append((row.path, claimed[row.path][0], pattern))
            claimed[row.path] = (pattern, row)
    if twice:
        path, first, second = twice[0]
        more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise ConfigError(f"{WHERE}: {show(first)} and {show(second)} both claim {path}{more}. One rule a site.")
    order = [*(path for path, _ in sites(model)), *parameters(model)]
    rows = tuple(claimed[path][1] for path in dict.fromkeys(order) if path in claimed)
    return InjectionPlan(rows, count(model), uncovered(model))


def class_and_options(factory: Factory) -> tuple[type[Adapter], dict[str, Any]]:
    """The Adapter class and the keyword options of a rule's factory."""
    cls, options = (factory.func, dict(factory.keywords)) if isinstance(factory, partial) else (factory, {})
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise ConfigError(f"{WHERE}: {factory!r} is neither an Adapter class nor functools.partial of one.")
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


def excluded(model: nn.Module, patterns: Sequence[Pattern]) -> set[str]:
    """Paths of the modules that ``patterns`` name, and of the parameters that they name or that lie in those."""
    own = parameters(model)
    left_out: set[str] = set()
    for pattern in patterns:
        found = set(matched(model, pattern)) | {p for p in own if isinstance(pattern, str) and matches(pattern, p)}
        if not found:
            where = "adapter.exclude"
            raise ConfigError(f"{where}: {show(pattern)} matches no module.{suggestion(pattern, dict(sites(model)))}")
        left_out |= found | {path for path in own if within(path, found)}
    return left_out


def within(path: str, modules: Collection[str]) -> bool:
    """Whether a parameter is of one of the modules, or of one within it."""
    parts = path.split(".")
    return any(".".join(parts[:n]) in modules for n in range(1, len(parts)))


def rows_of_sites(
    model: nn.Module, pattern: Pattern, adapter: type[Adapter], options: dict[str, Any], left_out: set[str]
) -> Iterator[Row]:
    known, kind, hits = dict(sites(model)), kinds(model), matched(model, pattern)
    if not hits:
        raise ConfigError(f"{WHERE}: {show(pattern)} matches no module.{suggestion(pattern, known)}")
    if hits.keys() <= left_out:
        raise ConfigError(f"{WHERE}: everything that {show(pattern)} matches is in adapter.exclude.")
    supported = {p: module for p, module in hits.items() if kind[p] in adapter.sites and p not in left_out}
    if not supported:
        path, module = next(iter(hits.items()))
        raise ConfigError(
            f"{WHERE}: {show(pattern)} matches {path} ({type(module).__name__}), but "
            f"{adapter.__name__} adapts {' and '.join(adapter.sites)} sites only.{suggestion(pattern, known)}"
        )
    shapes = {path: shape(module) for path, module in supported.items()}
    sizes = adapter_sizes(supported, shapes, adapter, options)
    for path, module in supported.items():
        yield Row(
            path=path,
            kind=type(module).__name__,
            shape=shapes[path],
            adapter=dotted(adapter),
            options=options,
            parameters=sizes[path],
            group=f"{path.rpartition('.')[0]}:{shapes[path][1]}",
        )


def rows_of_parameters(
    model: nn.Module, pattern: Pattern, adapter: type[Adapter], options: dict[str, Any], left_out: set[str]
) -> Iterator[Row]:
    """Rows of a method that trains the base's own parameters; NF4 weights cannot."""
    owner, own, modules = owners(model), parameters(model), matched(model, pattern)
    named = {p for p in own if isinstance(pattern, str) and layer_range(pattern)[1] is None and matches(pattern, p)}
    found = [p for p in own if (p in named or within(p, modules)) and p not in left_out]
    if not found:
        raise ConfigError(
            f"{WHERE}: {show(pattern)} matches no parameter of this {type(model).__name__}.{suggestion(pattern, own)}"
        )
    quantized = list(dict.fromkeys(p.rpartition(".")[0] for p in found if not own[p].is_floating_point()))
    if quantized:
        raise ConfigError(
            f"adapter: {adapter.__name__} trains the base's own weights, and NF4 weights cannot train "
            f"({len(quantized)} sites, first {quantized[0]}). Use quant=none, or an adapter such as lora."
        )
    for path in found:
        dimensions = tuple(own[path].shape)
        yield Row(path, type(owner[path]).__name__, dimensions, dotted(adapter), {}, own[path].numel(), path)


def adapter_sizes(
    bases: Mapping[str, nn.Module],
    shapes: dict[str, tuple[int, int]],
    adapter: type[Adapter],
    options: dict[str, Any],
) -> dict[str, int]:
    """Builds each adapter over a stand-in without values and counts its trainable parameters."""
    generator = torch.Generator("cpu")
    with torch.device("meta"):
        try:
            shared = adapter.shared(shapes, generator=generator, **options)
            built = {p: adapter(stand_in(b), generator=generator, **options, **shared) for p, b in bases.items()}
        except ValueError as error:
            raise ConfigError(f"adapter.{error}") from error
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
    return f"{cls.__module__}.{cls.__qualname__}"


def resolve(name: str) -> type[Adapter]:
    """The Adapter class that a plan's row names by its dotted path."""
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"adapter class {name} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise ConfigError(f"adapter class {name} is not a subclass of lowrank.adapters.Adapter")
    return cls
