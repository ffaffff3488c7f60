"""Which adapter each row of a batch goes through: one object that all sites of a model read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError, did_you_mean

Choice = str | None | tuple[str | None, ...]  # one adapter for the batch (None: the bare base), or one a row


def choice(given: object) -> Choice:
    """What ``use`` is given, a list of names as a tuple. Raises ConfigError for what is neither name nor list."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, Sequence):
        raise ConfigError(f"use: {given} is not allowed; a name, a list of names (one for each row), or None.")
    return tuple(given)


SELECT = "select_rows"  # the attribute of the model by which batched generation names the rows of a batch


@dataclass(frozen=True)
class Layout:
    """The rows of a batch, or the tokens of a pack, gathered by adapter."""

    dim: int  # 0: rows of a batch; 1: tokens of the one row of a pack
    names: tuple[str | None, ...]  # of the adapters, each once
    sizes: tuple[int, ...]  # how many rows, or tokens, are each one's
    order: Tensor | None  # what brings them together, or None where they stand together
    back: Tensor | None

    @classmethod
    def of(cls, owners: Tensor, names: Sequence[str | None], dim: int) -> Layout:
        """``owners`` (rows or tokens,) holds indices into ``names``."""
        counts = torch.bincount(owners, minlength=len(names)).tolist()
        names, sizes = zip(*((name, n) for name, n in zip(names, counts, strict=True) if n), strict=True)
        if bool((owners.diff() >= 0).all()):
            return cls(dim, names, sizes, None, None)
        order = owners.argsort(stable=True)
        return cls(dim, names, sizes, order, order.argsort())

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def fits(self, x: Tensor) -> bool:
        """Whether ``x`` (batch, seq, …) is of this batch or pack; or (1, seq, …), the same for all rows."""
        return x.shape[0] in (1, self.total) if self.dim == 0 else x.shape[:2] == (1, self.total)

    def gather(self, x: Tensor) -> Tensor:
        if self.dim == 0 and x.shape[0] == 1:  # what is the same for all rows: learnt positions
            x = x.expand(self.total, *x.shape[1:])  # (batch, seq, …)
        return x if self.order is None else x.index_select(self.dim, self.order)

    def scatter(self, y: Tensor) -> Tensor:
        return y if self.back is None else y.index_select(self.dim, self.back)


class Route:
    """What is switched: ``chosen``, and for a choice by row the layouts of the forward that runs.

    ``resident`` holds the adapters' names and, for one that sits on a block or the backbone, the first such site: it
    is for whole batches alone, because rows there share masks, caches and positions.
    """

    def __init__(self) -> None:
        self.resident: dict[str, str | None] = {}
        self.chosen: Choice = None
        self.layouts: tuple[Layout, ...] = ()
        self.handle: Any | None = None

    @property
    def names(self) -> tuple[str | None, ...]:
        """Those chosen: one for the batch, or one a row."""
        return self.chosen if isinstance(self.chosen, tuple) else (self.chosen,)

    def check(self, wanted: Choice) -> None:
        names = wanted if isinstance(wanted, tuple) else (wanted,)
        if not names:
            raise ConfigError("use: the list is empty; one name (or None for the base) for each row of the batch.")
        for name in names:
            if name is not None and name not in self.resident:
                hint = did_you_mean(str(name), self.resident)
                raise ConfigError(
                    f"use: no adapter '{name}' on the model.{hint} There are: {', '.join(self.resident)}."
                )
        for name in set(names) if len(set(names)) > 1 else ():
            if name is not None and self.resident[name] is not None:
                raise ConfigError(
                    f"use: '{name}' adapts {self.resident[name]}, a whole block or the backbone, where rows cannot go "
                    f"different ways; use it for the whole batch."
                )

    def switch(self, model: nn.Module, wanted: Choice) -> None:
        """Makes ``wanted`` the choice; a choice by row watches the model's calls for its rows."""
        self.chosen, self.layouts = wanted, ()
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
            vars(model).pop(SELECT, None)
        if isinstance(wanted, tuple) and self.resident:
            self.handle = model.register_forward_pre_hook(self.lay_out, with_kwargs=True)
            vars(model)[SELECT] = self.select

    def release(self, model: nn.Module) -> None:
        """The adapters are taken off."""
        self.resident = {}
        self.switch(model, None)

    @contextmanager
    def select(self, rows: Sequence[int], of: int) -> Iterator[None]:
        """Inside, a batch is made of these of the ``of`` rows (generation sorts its prompts and splits them)."""
        whole = self.chosen
        assert isinstance(whole, tuple)
        if of != len(whole):
            raise ConfigError(f"use: {len(whole)} names for {of} prompts; one for each.")
        self.chosen = tuple(whole[row] for row in rows)
        try:
            yield
        finally:
            self.chosen = whole

    def lay_out(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of the model: whose each of its rows is, or each token of its pack."""
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        ids = next(value for value in given if isinstance(value, Tensor))  # (batch, seq, …)
        edges = kwargs.get("cu_seqlens")
        assert isinstance(self.chosen, tuple)
        count, what = (ids.shape[0], "rows") if edges is None else (len(edges) - 1, "documents")
        if count != len(self.chosen):
            raise ConfigError(f"use: {len(self.chosen)} names for a batch of {count} {what}; one for each.")
        names = list(dict.fromkeys(self.chosen))
        owners = torch.tensor([names.index(name) for name in self.chosen], device=ids.device)
        if edges is None:
            self.layouts = (Layout.of(owners, names, 0),)
            return
        owners = owners.repeat_interleave(edges.to(ids.device).diff())  # (tokens,)
        kept = kept_by(kwargs.get("logits_to_keep"), owners)
        self.layouts = tuple(Layout.of(whose, names, 1) for whose in (owners, kept))

    def layout(self, x: Tensor, width: int, site: str) -> Layout:
        """The layout that fits a site's input; ``width`` dimensions stand behind its rows and positions."""
        for layout in self.layouts:
            if x.ndim == 2 + width and layout.fits(x):
                return layout
        raise ConfigError(
            f"use: by row: a layer of {site or 'the model'} is given {tuple(x.shape)}, in which the rows of the batch "
            f"cannot be told apart (experts, or a call that is not the model's own); use one adapter for all rows."
        )


def kept_by(kept: object, owners: Tensor) -> Tensor:
    """The owners of the positions that the head is run on: ``logits_to_keep``, positions or how many of the last."""
    if isinstance(kept, Tensor):
        return owners[kept.to(owners.device)]
    return owners[-kept:] if isinstance(kept, int) and kept else owners


class Switched:
    """What ``use`` or ``disable`` has changed, in force since the call; undone by ``undo``, or at the end of a
    ``with``."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self.undo = undo

    def __enter__(self) -> Switched:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()
