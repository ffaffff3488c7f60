"""The adapters of several runs on one tree of modules: in one pass each meets the documents of its own run.

Each run has its adapters on a tree of its own, as ever. ``bundle`` puts those very objects on another tree over the
same base, a ``Bundle`` at every site that one of them adapts. The tokens of a batch stand run by run, so that each
run's are one slice: the base runs once over all of them, and an adapter over its slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank.adapters.bank import Once
from lowrank.adapters.base import Adapted, Adapter
from lowrank.adapters.sites import TRAINED, adapted, replace, site_kind, sites
from lowrank.errors import ConfigError


class Slices:
    """Whose each token of the batch is, and each target: set before a forward, and as it is until after its
    backward."""

    def __init__(self) -> None:
        self.tokens: dict[int, slice] = {}
        self.targets: dict[int, slice] = {}

    def set(self, runs: Sequence[int], tokens: Sequence[int], targets: Sequence[int]) -> None:
        """The numbers of the runs whose turn it is, in the order in which they stand, and how many are each one's."""
        self.tokens, self.targets = slices(runs, tokens), slices(runs, targets)

    def of(self, width: int) -> dict[int, slice]:
        """The slices of an input of so many positions: all tokens, or (the head's) the targets alone."""
        for found in (self.tokens, self.targets):
            if found and list(found.values())[-1].stop == width:
                return found
        raise ConfigError(
            f"sweep.together: a layer is given {width} positions of a batch that has others, so that the runs' own "
            f"cannot be told apart (experts?). Train these jobs with sweep.together=1."
        )


def slices(runs: Sequence[int], sizes: Sequence[int]) -> dict[int, slice]:
    ends = list(accumulate(sizes))
    return {run: slice(end - size, end) for run, size, end in zip(runs, sizes, ends, strict=True)}


class Bundle(Adapter):
    """The adapters of one site by their runs' numbers. They are the objects that the runs train."""

    sites: ClassVar[tuple[str, ...]] = ()  # of no plan
    identity_at_start = False

    def __init__(self, slices: Slices) -> None:
        super().__init__()
        self.slices = slices

    @property
    def members(self) -> dict[int, Adapter]:
        return {int(run): module for run, module in self._modules.items() if isinstance(module, Adapter)}

    def put(self, run: int, adapter: Adapter) -> None:
        self._modules[str(run)] = adapter

    def at_work(self) -> list[tuple[Adapter, slice]]:
        """The adapters whose run has tokens in this batch, with those."""
        members = self.members
        return [(members[run], rows) for run, rows in self.slices.tokens.items() if run in members]

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """x (1, positions, …): each run's slice through its own adapter, or where it has none here the base alone."""
        owned = self.slices.of(x.shape[1])
        once = Once(base, x, [rows.stop - rows.start for rows in owned.values()], 1)
        shared, members, outputs = once.twin(), self.members, []
        for run, mine in zip(owned, once.parts, strict=True):
            once.asked = mine
            outputs.append(members[run](shared, mine) if run in members else shared(mine))
        return torch.cat(outputs, 1)


def bundle(model: nn.Module, runs: Mapping[int, nn.Module]) -> Slices:
    """Puts the adapters of ``runs`` (their models by number) on ``model``, a bare tree over the same base; what is
    returned says, before each forward, whose the tokens are."""
    found, bare, bundles = Slices(), dict(sites(model)), dict[str, Bundle]()
    model.requires_grad_(False)
    for run, one in runs.items():
        for path, site in adapted(one):
            if path not in bundles:
                bundles[path] = Bundle(found)
                replace(model, path, Adapted(bare[path], bundles[path], {}))
            bundles[path].put(run, site.adapter)
    return found


def leave(model: nn.Module, run: int) -> None:
    """Takes a run's adapters off the common tree."""
    for _, site in adapted(model):
        site.adapter._modules.pop(str(run), None)


def why_not(model: nn.Module) -> str | None:
    """What keeps a model's adapters from a common tree, or None."""
    if getattr(model, TRAINED, ()):
        return "parameters of the base itself train"
    return next(reasons(model), None)


def reasons(model: nn.Module) -> Iterator[str]:
    for path, site in adapted(model):
        name = type(site.adapter).__name__
        if site.original is not site.base:
            yield f"the start of {name} changed the base ({path})"
        if site_kind(site.base) == "other":
            yield f"{name} stands around {path}, a whole block or the backbone"
        if site.adapter.virtual_tokens:
            yield f"{name} takes positions of the model"
