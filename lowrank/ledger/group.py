"""What several runs that train in one pass take together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lowrank.ledger import process
from lowrank.ledger.ledger import Ledger, Shape

# Of one run, however many there are; every other part is each run's own, and adds up.
ONCE = ("interpreter", "weights", "quantisation", "buffers", "dequantisation", "evaluation", "loading")
PASSING = ("activations", "loss", "workspace")  # of a pass, by its tokens


def of_group(ledgers: Sequence[Ledger | None], share: float = 1.0) -> Ledger | None:
    """The ledger of a group, each of whose runs has one; else None.

    The base and what a run does by itself (evaluating, saving) count once. Adapters, gradients, optimizers' states and
    what is kept for backward are of all runs, the last for ``share`` of the tokens that the runs' largest micro-batches
    have together (``fullest``).
    """
    known = [one for one in ledgers if one is not None]
    if not known or len(known) < len(ledgers):
        return None
    most = max(known, key=lambda one: one.peak)
    parts = {name: combined(name, known) for name in most.parts}
    parts |= {name: round(share * parts.get(name, 0)) for name in PASSING}
    parts["slack"] = most.parts.get("slack", 0) + round(holes(most) * (added(parts) - added(most.parts)))
    more = sum(parts.values()) - sum(most.parts.values())  # than the largest of them would take alone
    kept = sum(parts[name] - most.parts[name] for name in ("adapters", "gradients", "optimizer"))
    phases = {name: size + (more if name == "step" else kept) for name, size in most.phases.items()}
    note = f"of {len(known)} runs in one pass: one base, {len(known)} adapters, gradients, optimizers and micro-batches"
    return replace(most, parts=parts, phases=phases, shape=shape(known), notes=(note, *most.notes), tokens_per_s=None)


def fullest(tokens: Sequence[Sequence[Sequence[int]]]) -> float:
    """Of the tokens that the runs' largest micro-batches have together, what the largest pass has: ``tokens`` are those
    of each run, step and micro-batch, which are known before the first."""
    largest = sum(max(n for step in run for n in step) for run in tokens)
    passes = Counter[tuple[int, int]]()
    for run in tokens:
        passes.update({(step, index): n for step, micro in enumerate(run) for index, n in enumerate(micro)})
    return max(passes.values()) / largest


def combined(name: str, ledgers: Sequence[Ledger]) -> int:
    sizes = [one.parts.get(name, 0) for one in ledgers]
    return max(sizes) if name in ONCE else sum(sizes)


def added(parts: Mapping[str, int]) -> int:
    """Bytes that come and go with a step: between them, holes."""
    return sum(parts.get(name, 0) for name in PASSING)


def holes(ledger: Ledger) -> float:
    return process.ROUNDED if ledger.device.startswith("cuda") else process.HOLES


def shape(ledgers: Sequence[Ledger]) -> Shape:
    """The largest micro-batch of each, end to end."""
    first = ledgers[0].shape
    step = tuple(length for one in ledgers for length in one.shape.step)
    return replace(first, step=step, targets=sum(one.shape.targets for one in ledgers))
