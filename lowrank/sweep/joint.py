"""One tree of modules on which several runs make their forward and backward together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lowrank import assemble
from lowrank.adapters import together
from lowrank.assemble import Parts
from lowrank.data.pack import Batch, joined
from lowrank.models import attention
from lowrank.session.session import Session
from lowrank.train.precision import Precision


class Joint:
    """The forward of several runs: their micro-batches end to end, a slice for each.

    loss_k = Σ −log p over the targets in k's slice; every token meets the base and its own run's adapters, and
    attention stays within documents. So no number of one run depends on another's, but in how kernels round.
    """

    def __init__(self, tree: nn.Module, runs: Mapping[int, nn.Module], parts: Parts, precision: Precision) -> None:
        """``tree``: modules over the base of ``runs``, their models by number, that carry nothing yet; ``parts`` and
        ``precision``: those of one of them, since all compute alike."""
        self.tree, self.parts, self.precision = tree, parts, precision
        self.slices = together.bundle(tree, runs)
        self.told = assemble.quickened(parts, tree)
        self.losses = assemble.losses(parts.config)
        tree.train()

    def __call__(self, runs: Sequence[int], batches: Sequence[Batch]) -> list[Tensor]:
        """The summed loss of each run's micro-batch."""
        targets = [len(batch.targets) for batch in batches]
        self.slices.set(runs, [batch.real_tokens for batch in batches], targets)
        with self.precision.autocast():
            losses = self.losses(self.tree, joined(batches).to(self.parts.device))  # (targets of all,)
        return [part.sum() for part in losses.split(targets)]

    def leave(self, run: int) -> None:
        """A run is over: nothing of it is held here any longer. It may have been what kept blocks plain."""
        together.leave(self.tree, run)
        assemble.quickened(self.parts, self.tree)


def why_not(session: Session, first: Session) -> str | None:
    """What keeps a session, its adapters in place, from one pass with ``first``; None where nothing does."""
    config, model = session.config, session.model
    if not session.loaded.packed:
        return "its documents are padded, not packed"
    if attention.has_experts(model):
        return "the model routes tokens to experts"
    if drops(model):
        return "the model's own dropout is on"
    if config.optim.in_backward:
        return "optim.in_backward moves parameters within the pass"
    if config.loop.profile is not None:
        return "loop.profile would see all of them"
    if how(session.parts) != how(first.parts) or session.base != first.base:
        return "it computes otherwise than the first of them"
    return together.why_not(model)


def drops(model: nn.Module) -> bool:
    """Whether the model drops something itself, by draws from one stream that a run alone has to itself."""
    return any((isinstance(m, nn.Dropout) and m.p) or getattr(m, "attention_dropout", 0.0) for m in model.modules())


def how(parts: Parts) -> tuple[Any, ...]:
    """A run computes in this way: on a device, in a precision, by a path."""
    loop = parts.config.loop
    return parts.device, parts.precision, loop.fast, loop.gradient_checkpointing, loop.offload, loop.compile
