"""Full fine-tuning, as a plan: nothing is wrapped, the base's own parameters train."""

from __future__ import annotations

from torch import nn

from lowrank.adapters.base import Adapter


class Full(Adapter):
    """W' = W + ΔW with ΔW unconstrained.

    Its rows name parameters, not sites: a target is a glob or a name of parameters (``*`` for all of them,
    ``*.weight``, ``*norm*``). It has no options and is never constructed.
    """

    sites = ("parameter",)

    def __init__(self, base: nn.Module, *, generator: object) -> None:
        raise TypeError("Full trains the base's own parameters; there is nothing to construct")
