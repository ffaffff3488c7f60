"""What stands between a method of ours and PEFT's type of it; the types themselves are in ``peft_types.py``."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.base import Adapter
from lowrank.errors import RefusedError
from lowrank.export.peft_config import Config, Field

T = TypeVar("T")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Site:
    """An adapter that is to be written."""

    path: str
    adapter: Any
    options: Mapping[str, Any]  # that were given for it
    base: nn.Module  # that it stands on
    moved: bool  # whether its start changed the base
    layer: nn.Module  # what PEFT will find there: of an NF4 layer the architecture's own

    def option(self, name: str) -> Any:
        """As it was given, or by default."""
        return self.options.get(name, inspect.signature(type(self.adapter)).parameters[name].default)


@dataclass(frozen=True)
class Folder:
    """What was read from PEFT's two files."""

    file: Path  # of the tensors
    config: Config
    sites: dict[str, Tensors]  # path → the tensors there by PEFT's names
    apart: Tensors  # those that lie at no site
    copies: Tensors  # base weights that PEFT saves beside an adapted embedding or head, by the module's path

    def dimension(self, path: str, name: str, axis: int) -> int:
        """Of a matrix at a site; raises RefusedError where there is no such matrix."""
        found = self.sites[path].get(name)
        if found is None or found.ndim != 2:
            what = "is missing" if found is None else f"has shape {tuple(found.shape)}, and is no matrix"
            raise RefusedError(f"{self.file}: {path}.{name} {what}.")
        return found.shape[axis]


class Format(ABC):
    """A PEFT type and the methods that are written as it.

    As it stands it is right for a method that computes what PEFT's does from the same tensors, whatever PEFT calls
    them and however it shapes them.
    """

    peft_type: ClassVar[str]
    methods: ClassVar[tuple[type[Adapter], ...]]
    names: ClassVar[Mapping[str, str]] = {}  # PEFT's name of a tensor at a site → the adapter's
    apart: ClassVar[Mapping[str, str]] = {}  # the same of tensors that lie at no site, of which there is one for all
    reads: ClassVar[Mapping[str, Field]]  # fields that say what is computed
    neutral: ClassVar[frozenset[str]] = frozenset()  # fields that do not

    @property
    def name(self) -> str:
        return self.methods[0].__name__

    # What we write

    def why_not(self, sites: Sequence[Site]) -> str | None:
        """What PEFT cannot hold of these, as a sentence without its end; None where it can."""
        return None

    @abstractmethod
    def fields(self, sites: Sequence[Site], written: Mapping[str, Tensors]) -> dict[str, Any]:
        """The type's own fields; ``written`` are the tensors at each site."""

    def tensors(self, adapter: Any, base: nn.Module) -> Tensors:
        """What is written at a site, by PEFT's names."""
        return {
            theirs: getattr(adapter, ours).detach() for theirs, ours in self.names.items() if hasattr(adapter, ours)
        }

    def tensors_apart(self, adapter: Any) -> Tensors:
        return {theirs: getattr(adapter, ours).detach() for theirs, ours in self.apart.items()}

    # What we read

    def method(self, config: Config) -> type[Adapter]:
        return self.methods[0]

    @abstractmethod
    def options(self, folder: Folder, path: str, base: nn.Module) -> dict[str, Any]:
        """The constructor's options for a site."""

    def shapes(self, folder: Folder, path: str, adapter: Any, base: nn.Module) -> dict[str, tuple[int, ...]]:
        """The shapes that a site's tensors must have for the adapter that ``options`` made."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors(adapter, base).items()}

    def shapes_apart(self, folder: Folder, adapter: Any) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors_apart(adapter).items()}

    def state(self, folder: Folder, path: str, adapter: Any) -> Tensors:
        """The adapter's parameters by our names, of tensors that have these shapes."""
        found = {self.names[name]: tensor for name, tensor in folder.sites[path].items()}
        found |= {self.apart[name]: tensor for name, tensor in folder.apart.items()}
        return {name: tensor.view_as(getattr(adapter, name)) for name, tensor in found.items()}


def usual(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The value that most sites have, and the others' by a pattern that matches their path alone."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {f"^{re.escape(path)}": value for path, value in values.items() if value != most}


def several(sites: Sequence[Site], options: Mapping[str, str]) -> str | None:
    """Why not, where sites differ in an option for which PEFT has one field (its name) for all of them."""
    for option, field in options.items():
        first = sites[0].option(option)
        for site in sites:
            if site.option(option) != first:
                here = f"{first} on {sites[0].path} and {site.option(option)} on {site.path}"
                return f"{option} is {here}, and PEFT has one {field} for all sites"
    return None


def on_conv1d(sites: Sequence[Site], method: str) -> str | None:
    """Why not, where a site is a Conv1D, which some of PEFT's methods do not take."""
    path = next((site.path for site in sites if isinstance(site.layer, Conv1D)), None)
    return None if path is None else f"{path} is a Conv1D, which PEFT's {method} does not take"


def transposed(sites: Sequence[Site]) -> bool:
    """``fan_in_fan_out``"""
    return any(isinstance(site.layer, Conv1D) for site in sites)


def dropout(sites: Sequence[Site]) -> float:
    """PEFT has one for all sites."""
    found = {getattr(site.adapter, "dropout", 0.0) for site in sites}
    one = found.pop() if len(found) == 1 else 0.0
    return one if isinstance(one, float) else 0.0
