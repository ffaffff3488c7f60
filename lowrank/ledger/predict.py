"""The ledger of a run that has not begun."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lowrank import assemble
from lowrank.adapters.sites import adapted, blocks, kinds, sites
from lowrank.assemble import Data, Parts
from lowrank.eval.generate import room
from lowrank.fast.block import why_not
from lowrank.fast.recompute import widths
from lowrank.ledger import bare as without_values
from lowrank.ledger import process, step
from lowrank.ledger.bare import Bare
from lowrank.ledger.ledger import PARTS, Ledger, Shape
from lowrank.ledger.optimizer import gradients_kept, of, state_bytes
from lowrank.ledger.resident import by_part, size_of
from lowrank.ledger.shapes import at_most, of_data, share
from lowrank.ledger.step import Found

MORE = 0.01  # of the peak, that is worth another look
NOTHING = "not worth a look"
COPIES = 2.4  # of what trains, while it is written
FEWER = 4  # times: what plain blocks keep is at most so much more than fused ones do
NO_DATA = "there is no data: data.max_length stands for every text, all of it targets"


def predict(parts: Parts, data: Data | None, interpreter: int | None = None) -> Ledger:
    """Bytes by part, the peak and FLOPs a token of the run that ``parts`` and ``data`` make; no weight is read.

    Without data every text is taken to be of ``data.max_length`` tokens. ``interpreter``: bytes of the process before
    there was a model, where it is not what it is now. Raises what the model's own code raises.
    """
    before = process.interpreter(parts.device) if interpreter is None else interpreter
    bare = without_values.build(parts)
    static = resident(bare, parts)
    longest = longest_of(bare, parts)
    shape = of_data(parts, data, bare.packed) if data else at_most(parts.config, longest, bare.packed, NO_DATA)
    probe = over_blocks(bare, lambda kept: preflight(bare, kept, parts, data, shape))
    assemble.quickened(parts, bare.model)
    shape, cost = largest(bare, parts, data, shape)
    judged = over_blocks(bare, lambda kept: evaluation(bare, parts, shape, share(data)))
    flops = over_blocks(bare, lambda kept: counting(bare, kept, parts, longest, share(data)))
    always, again = {"interpreter": before, **static}, computed_again(bare, parts, shape, cost)
    return put_together(parts, holes(bare.model), always, again, cost, probe, judged, flops, shape)


def largest(bare: Bare, parts: Parts, data: Data | None, shape: Shape) -> tuple[Shape, Found]:
    """The micro-batch that takes most, and what it takes: that of most tokens, unless another has so many more targets
    that it seems to take more by what a token and a target take in the first."""

    def cost(one: Shape) -> Found:
        return over_blocks(bare, lambda kept: step.trained(bare, kept, parts, one.step, one.targets))

    first = cost(shape)
    kept, head = (max(tags.get(tag, 0.0) for tags in segments(first).values()) for tag in ("activations", "loss"))
    if data is None or not kept or not shape.targets:
        return shape, first
    other = of_data(parts, data, bare.packed, head / shape.targets / (kept / shape.tokens))
    more = kept * (other.tokens / shape.tokens - 1) + head * (other.targets / shape.targets - 1)
    if more < MORE * peak_of(first):
        return shape, first
    second = cost(other)
    return (other, second) if peak_of(second) > peak_of(first) else (shape, first)


def preflight(bare: Bare, kept: Sequence[int], parts: Parts, data: Data | None, shape: Shape) -> Found:
    """The first two documents on the plain path; nothing where they are so few tokens that a step takes more anyway."""
    probe = [len(one.tokens) for one in data.train[:2]] if data else list(shape.step[:2])
    if FEWER * sum(probe) < shape.tokens and parts.config.loop.gradient_checkpointing == "off":
        return {(NOTHING, "activations"): 0.0}
    targets = sum(sum(one.target) for one in data.train[:2]) if data else sum(probe) - len(probe)
    return step.trained(bare, kept, parts, probe, targets, plain=True)


def evaluation(bare: Bare, parts: Parts, shape: Shape, targets: float) -> Found:
    """The held-out loss, ``targets`` of whose tokens are such, and generating."""
    found = step.evaluated(bare, parts, shape.evaluation, round(targets * sum(shape.evaluation)))
    if not shape.prompts:
        return found
    return found | step.generated(bare, parts, shape.prompts, parts.config.eval.generate.max_new_tokens)


def counting(bare: Bare, kept: Sequence[int], parts: Parts, longest: int, targets: float) -> Found:
    """FLOPs a token of one document of ``longest`` tokens, ``targets`` of them such."""
    found = step.trained(bare, kept, parts, [longest], min(longest - 1, round(targets * longest)))
    return {key: count / longest for key, count in found.items() if key[0] == step.FLOPS}


def longest_of(bare: Bare, parts: Parts) -> int:
    """``data.max_length``, or the positions that the model has, where they are fewer."""
    return min(parts.config.data.max_length, room(bare.model) or parts.config.data.max_length)


def over_blocks(bare: Bare, measure: Callable[[Sequence[int]], Found]) -> Found:
    """``measure`` of the whole model, from a few of its blocks: what each further one of a run adds is the same."""
    with bare.only(bare.short):
        base = measure(bare.short)
    total = dict(base)
    for index, (count, few) in enumerate(zip(bare.runs, bare.short, strict=True)):
        if count > few:
            longer = [n + (i == index) for i, n in enumerate(bare.short)]
            with bare.only(longer):
                more = measure(longer)
            for key in base:
                total[key] += (count - few) * (more.get(key, 0.0) - base[key])
    return total


def computed_again(bare: Bare, parts: Parts, shape: Shape, cost: Found) -> int:
    """Bytes of one block's activations that backward makes anew."""
    mode, inner = parts.config.loop.gradient_checkpointing, dict(sites(bare.model))
    first = next((inner[path] for path in blocks(bare.model)), None)
    if mode == "off" or first is None:
        return 0
    if parts.config.loop.fast and why_not(first) is None:
        return widths(first).again(mode, parts.dtype.itemsize, parts.dtype.itemsize) * shape.tokens
    return round(max(tags.get("recompute", 0.0) for tags in segments(cost).values()))


def segments(found: Found) -> dict[str, dict[str, float]]:
    by: dict[str, dict[str, float]] = {}
    for (segment, tag), size in found.items():
        if segment != step.FLOPS:
            by.setdefault(segment, {})[tag] = size
    return by


def peak_of(found: Found) -> float:
    return max(sum(tags.values()) for tags in segments(found).values())


def resident(bare: Bare, parts: Parts) -> dict[str, int]:
    """Bytes of what lies in memory throughout."""
    sizes, config, trained = by_part(bare.model), parts.config, of(bare.model)
    sizes["adapters"] += size_of(trained) if config.loop.average is not None else 0
    return sizes | {
        "gradients": gradients_kept(config, bare.model),
        "optimizer": state_bytes(config, trained, bare.mode),
    }


def put_together(
    parts: Parts,
    holes: float,
    always: dict[str, int],
    again: int,
    cost: Found,
    probe: Found,
    judged: Found,
    flops: Found,
    shape: Shape,
) -> Ledger:
    steady = sum(always.values())
    most = {tag: round(size) for tag, size in max(segments(cost).values(), key=lambda t: sum(t.values())).items()}
    seen, tried, reading = round(peak_of(judged)), round(peak_of(probe)), loading(parts, always)
    unmade = always["optimizer"] + always["gradients"]  # before the first step
    left = 0 if always["gradients"] else 4 * parts.plan.trainable_parameters  # of the step before an evaluation

    def slack(size: int, again: int = 0) -> int:
        return process.slack(parts.device, parts.config.quant.kind != "none", holes, size, again)

    added = sum(most.values())
    besides = slack(added, again)
    phases = {
        "loading": steady - unmade - always["adapters"] + reading + slack(reading),
        **({"pre-flight": steady - unmade + tried + slack(tried)} if tried else {}),
        "step": steady + added + besides,
        "evaluation": steady + left + seen + slack(seen),
        "saving": steady + left + round(COPIES * 4 * parts.plan.trainable_parameters) + slack(0),
    }
    most["gradients"] = most.get("gradients", 0) + always["gradients"]
    found = {**always, **most, "evaluation": seen, "loading": reading, "slack": besides}
    counts = {name: flops[step.FLOPS, name] for name in ("forward", "backward")}
    return Ledger(
        {name: found.get(name, 0) for name in PARTS},
        phases,
        counts | {"total": sum(counts.values())},
        shape,
        str(parts.device),
    )


def holes(model: Any) -> float:
    """How much of what a step adds lies unused between its tensors on a CPU: more, the more linear layers are not
    bare."""
    kind = kinds(model)
    linears = [path for path in kind if kind[path] == "linear"]
    there = {path for path, _ in adapted(model)}
    busy = sum(path in there for path in linears) / len(linears) if there and linears else 1.0
    return process.FEWER + (process.HOLES - process.FEWER) * busy


def loading(parts: Parts, always: dict[str, int]) -> int:
    """What reading takes besides: the file's pages where its type is another one, and of a 4-bit base the largest
    weight, as it is read and in fp32."""
    if parts.config.quant.kind == "none":
        return 0
    return 2 * max((4 * math.prod(row.shape) for row in parts.plan.rows), default=0)
