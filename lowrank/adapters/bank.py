"""Several named adapters on one model: switched, mixed within a batch, frozen and trained one by one.

``lowrank.load_adapter(model, folder, name="a")`` and ``apply(model, plan, name="a")`` put them on. Every adapted site
then has a ``Bank`` of those that adapt it, and all banks of a model read one ``Route``: switching changes that one
object, and a call looks one name up, however many adapters are resident.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapted, Adapter, NotMergeable
from lowrank.adapters.methods.update import owns
from lowrank.adapters.route import Route, Switched, choice
from lowrank.adapters.sites import TRAINED, adapted, replace, site_kind, sites
from lowrank.errors import ConfigError, did_you_mean
from lowrank.keys import Clock

DEFAULT = "default"  # the name of an adapter that was on the model without one


class Bank(Adapter):
    """The adapters of one site by name, its submodules: ``….q_proj.adapter.a.A``.

    y = adapter(base, x) of the chosen name, or base(x) where it has none here. By row, x is gathered by adapter and
    each one is called on its rows; a linear base runs over all rows at once where an adapter asks for base(x), and
    again for one that asks it anything else (the base of changed inputs, an OFT's).
    """

    sites: ClassVar[tuple[str, ...]] = ()  # of no plan
    identity_at_start = False

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route
        self.options: dict[str, dict[str, Any]] = {}
        self.trained: dict[str, frozenset[str]] = {}  # what trains of each where it is not frozen

    def get(self, name: str | None) -> Adapter | None:
        """The adapter of this name, if it adapts this site; None for the bare base."""
        found = None if name is None else self._modules.get(name)
        return found if isinstance(found, Adapter) else None

    @property
    def members(self) -> dict[str, Adapter]:
        return {name: module for name, module in self._modules.items() if isinstance(module, Adapter)}

    def put(self, name: str, adapter: Adapter, options: dict[str, Any]) -> None:
        self._modules[name] = adapter.train(self.training)
        self.options[name], self.group = options, adapter.group
        self.trained[name] = frozenset(n for n, p in adapter.named_parameters() if p.requires_grad)

    def chosen(self) -> Adapter | None:
        """The one adapter that all rows go through; raises NotMergeable where there is not one."""
        if isinstance(self.route.chosen, tuple):
            raise NotMergeable("the rows of a batch go through adapters of their own (lowrank.use with a list)")
        return self.get(self.route.chosen)

    @property
    def virtual_tokens(self) -> int:  # type: ignore[override]
        """Of those in use."""
        return max(getattr(self.get(name), "virtual_tokens", 0) for name in self.route.names)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        names = self.route.names
        here = {name: self.get(name) for name in names}
        if len(set(here.values())) > 1:
            return self.by_row(base, *args)
        adapter = here[names[0]]
        return base(*args, **kwargs) if adapter is None else adapter(base, *args, **kwargs)

    def by_row(self, base: nn.Module, x: Tensor) -> Tensor:
        layout = self.route.layout(x, 0 if isinstance(base, nn.Embedding) else 1, self.group.partition(":")[0])
        once = Once(base, layout.gather(x), layout.sizes, layout.dim)
        shared, outputs = once.twin(), []
        for name, part in zip(layout.names, once.parts, strict=True):
            once.asked, adapter = part, self.get(name)
            outputs.append(shared(part) if adapter is None else adapter(shared, part))
        return layout.scatter(torch.cat(outputs, layout.dim))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        chosen = self.chosen()
        return (weight, bias) if chosen is None else chosen.merged(weight, bias)

    def penalty(self) -> Tensor | float:
        """Of the adapters that train."""
        training = [m for m in self.members.values() if any(p.requires_grad for p in m.parameters())]
        return sum((member.penalty() for member in training), start=0.0)

    @property
    def clock(self) -> Clock:
        """That of all its adapters."""
        return next((member.clock for member in self.members.values()), Adapter.clock)

    @clock.setter
    def clock(self, clock: Clock) -> None:
        for member in self.members.values():
            member.clock = clock


class Once:
    """A linear base for the parts of one input: base(x) is computed for all of it when one of them is first asked
    for, and each part's output is handed out once (an adapter may write into it).

    An adapter is given a shallow copy of the base, so that its class and its weight are what they are; the copy's
    ``forward`` alone is another. A base that is hooked, or of a class of its own, is called part by part.
    """

    def __init__(self, base: nn.Module, x: Tensor, sizes: Sequence[int], dim: int) -> None:
        self.base, self.x, self.sizes, self.dim = base, x, sizes, dim
        self.parts = x.split(list(sizes), dim)
        self.outputs: list[Tensor | None] | None = None
        self.asked = x

    def twin(self) -> nn.Module:
        if not owns(self.base) or self.base._forward_pre_hooks:
            return self.base
        twin = copy.copy(self.base)
        vars(twin)["forward"] = self.forward
        return twin

    def forward(self, x: Tensor) -> Tensor:
        if x is not self.asked:
            return self.base(x)
        if self.outputs is None:  # no views of one tensor to autograd: each may be written in place
            self.outputs = list(torch.unsafe_split_with_sizes(self.base(self.x), list(self.sizes), self.dim))
        at = next(i for i, part in enumerate(self.parts) if part is x)
        output, self.outputs[at] = self.outputs[at], None
        return self.base(x) if output is None else output


class Held(NamedTuple):
    """An adapter at its site."""

    site: Adapted
    adapter: Adapter
    options: dict[str, Any]


def held(model: nn.Module, name: str | None = None) -> dict[str, Held]:
    """The sites of one adapter by path: of the named one, or of the only one.

    Raises ConfigError where there is none of that name, or several and no name.
    """
    name = which(model, name)
    if name is None:
        return {path: Held(site, site.adapter, site.options) for path, site in adapted(model)}
    return {
        path: Held(site, bank.members[name], bank.options[name])
        for path, site, bank in banks(model)
        if name in bank.members
    }


def which(model: nn.Module, name: str | None) -> str | None:
    """The adapter that is meant; None for one without a name."""
    route = route_of(model)
    resident = route.resident if route else {}
    if name is not None and name not in resident:
        raise unknown(name, resident)
    if name is None and len(resident) > 1:
        raise ConfigError(f"the model carries several adapters ({', '.join(resident)}): say which, name=….")
    return name or next(iter(resident), None)


def unknown(name: str, resident: Mapping[str, Any]) -> ConfigError:
    if not resident:
        return ConfigError(
            f"'{name}': the model carries no named adapter; load_adapter(model, folder, name=…) adds one."
        )
    return ConfigError(
        f"no adapter '{name}' on the model.{did_you_mean(name, resident)} There are: {', '.join(resident)}."
    )


def banks(model: nn.Module) -> Iterator[tuple[str, Adapted, Bank]]:
    return ((path, site, site.adapter) for path, site in adapted(model) if isinstance(site.adapter, Bank))


def route_of(model: nn.Module) -> Route | None:
    """The switch of a model with named adapters."""
    return next((bank.route for _, _, bank in banks(model)), None)


def admit(model: nn.Module, name: str) -> None:
    """Raises ConfigError where an adapter of this name cannot be put on the model."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or hasattr(Bank(Route()), name):
        raise ConfigError(
            f"name: '{name}' is not allowed; letters, digits, _ and -, and no name of {Bank.__name__}'s own."
        )
    route = route_of(model)
    wrapped = list(adapted(model))
    if name in (route.resident if route else [DEFAULT] if wrapped else []):
        raise ConfigError(f"name: an adapter '{name}' is on the model already. Choose another.")
    if getattr(model, TRAINED, ()):
        raise ConfigError("several adapters share a base that stays as it is; this one trains its own parameters.")
    for path, site in wrapped:
        if site.original is not site.base:
            raise ConfigError(
                f"the adapter on the model changed its base at the start ({path}), so another cannot stand beside it. "
                f"Save it, lowrank.remove(model), and load it with a name."
            )


def enter(model: nn.Module, name: str, adapters: Mapping[str, Adapter], options: Mapping[str, dict[str, Any]]) -> None:
    """Puts adapters into the banks of their sites, which are made where they are missing; one that was on the model
    without a name becomes "default". The first one is the one in use."""
    route = route_of(model) or banked(model)
    bare, wrapped = dict(sites(model)), dict(adapted(model))
    for path, adapter in adapters.items():
        if path not in wrapped:
            wrapped[path] = Adapted(bare[path], Bank(route), {})
            replace(model, path, wrapped[path])
        bank = wrapped[path].adapter
        assert isinstance(bank, Bank)
        bank.put(name, adapter, options[path])
    register(route, name, {path: bare[path] for path in adapters})


def banked(model: nn.Module) -> Route:
    """Turns the adapter that is on the model, if there is one, into a bank's first."""
    route = Route()
    wrapped = dict(adapted(model))
    for site in wrapped.values():
        bank = Bank(route)
        bank.put(DEFAULT, site.adapter, site.options)
        site.adapter, site.options = bank.train(site.training), {}
    if wrapped:
        register(route, DEFAULT, {path: site.base for path, site in wrapped.items()})
    return route


def register(route: Route, name: str, bases: Mapping[str, nn.Module]) -> None:
    if not route.resident:
        route.chosen = name
    route.resident[name] = next((path for path, base in bases.items() if site_kind(base) == "other"), None)


def use(model: nn.Module, name: str | Sequence[str | None] | None) -> Switched:
    """Sends the model's calls through the adapter ``name``, or (None) through the bare base.

    A list names one for each row of the batch, or for each document of a pack (``cu_seqlens``), None the base. The
    call itself switches, until further notice; as ``with lowrank.use(model, "a"):`` it is undone at the end. A
    backward belongs inside. Raises ConfigError, with nothing changed, for a name that is not on the model; the
    model's call raises it where the list is not as long as the batch.
    """
    route = route_of(model)
    if route is None:
        raise ConfigError("use: the model carries no named adapter; load_adapter(model, folder, name=…) adds one.")
    wanted = choice(name)
    route.check(wanted)
    before = route.chosen
    route.switch(model, wanted)
    return Switched(lambda: route.switch(model, before))


def disable(model: nn.Module) -> Switched:
    """The bare base: until further notice, or to the end of a ``with``. No ``requires_grad`` is touched.

    Raises ConfigError where the base is not there any more: where its own parameters train, or the adapter's start
    changed it and the original was not kept.
    """
    if route_of(model) is not None:
        return use(model, None)
    wrapped = [site for _, site in adapted(model)]
    if getattr(model, TRAINED, ()):
        raise ConfigError("disable: the base's own parameters train, and what they were before is not kept.")
    if not wrapped:
        raise ConfigError("disable: the model carries no adapter.")
    if any(site.original is None for site in wrapped):
        raise ConfigError("disable: the adapter's start changed the base, and the original was not kept.")
    before = [site.bypassed for site in wrapped]

    def bypass(values: Sequence[bool]) -> None:
        for site, value in zip(wrapped, values, strict=True):
            site.bypassed = value

    bypass([True] * len(wrapped))
    return Switched(lambda: bypass(before))


def freeze(model: nn.Module, name: str) -> None:
    """The adapter ``name`` does not train: nothing of it requires grad, and a gradient that it has is dropped."""
    for found in held(model, name).values():
        found.adapter.requires_grad_(False)
        found.adapter.zero_grad(set_to_none=True)


def unfreeze(model: nn.Module, name: str) -> None:
    """What trained of the adapter ``name`` when it was put on trains again."""
    which(model, name)
    for _, _, bank in banks(model):
        for parameter, value in bank.members[name].named_parameters() if name in bank.members else ():
            value.requires_grad_(parameter in bank.trained[name])
