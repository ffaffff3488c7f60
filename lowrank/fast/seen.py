"""What was looked at when a block was taken, so that a call need not look at all of it again.

A block's fused forward passes its modules' own calls by, so whatever would change those calls has to be noticed at
each of its own: hooks, another module in a place, weights that train, an adapter bypassed or switched. Looking through
the whole block costs more than the call's Python otherwise does; comparing with what was there costs little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.module_tracker import ModuleTracker

from lowrank.adapters.bank import Bank
from lowrank.adapters.base import Adapted, Adapter
from lowrank.adapters.together import Bundle

SEEN = "_seen"  # the fused block's attribute
GLOBAL = (
    *("_global_forward_pre_hooks", "_global_forward_hooks", "_global_forward_hooks_always_called"),
    *("_global_forward_hooks_with_kwargs", "_global_backward_pre_hooks", "_global_backward_hooks"),
)


@dataclass(frozen=True)
class Seen:
    """A module as it was found: without hooks, frozen where it is the model's own."""

    module: Any
    kind: Any
    children: tuple[Any, ...]
    choice: Any  # of a bank's adapters, or of a site's adapter or its bypass

    @property
    def same(self) -> bool:
        module = self.module
        if type(module) is not self.kind or tuple(module._modules.values()) != self.children or hooked(module):
            return False
        if isinstance(module, (Adapter, Adapted)):
            return bool(choice(module) == self.choice)
        if isinstance(module, nn.Dropout):
            return not module.p
        return not any(p is not None and p.requires_grad for p in module._parameters.values())


def choice(module: Any) -> Any:
    if isinstance(module, Bank):
        return module.route.chosen
    return module.bypassed if isinstance(module, Adapted) else None


def hooked(module: Any) -> bool:
    """Whether somebody is to see a module's calls or gradients, which fusing would pass by."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def watched() -> bool:
    """Whether there are hooks on every module there is. FlopCounterMode's own only ask where an operation ran."""
    hooks = (hook for name in GLOBAL for hook in getattr(torch.nn.modules.module, name).values())
    return bool(_has_any_global_hook()) and any(
        not isinstance(getattr(h, "__self__", None), ModuleTracker) for h in hooks
    )


def note(block: nn.Module) -> None:
    vars(block)[SEEN] = tuple(
        Seen(module, type(module), tuple(module._modules.values()), choice(module))
        for module in inside(block)
        if module is not block
    )


def inside(module: nn.Module) -> Iterator[nn.Module]:
    """The module and what is in it, of a bank's adapters the chosen one alone: the others take no part in a call. A
    bundle's are looked at as its children: their own runs see to them."""
    yield module
    if isinstance(module, Bundle):
        return
    for name, child in module.named_children():
        if not isinstance(module, Bank) or name in module.route.names:
            yield from inside(child)


def forget(block: nn.Module) -> None:
    vars(block).pop(SEEN, None)


def unchanged(block: nn.Module) -> bool:
    return all(one.same for one in vars(block)[SEEN])
