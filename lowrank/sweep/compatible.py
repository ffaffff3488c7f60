"""Which jobs of a sweep may share what: told from their configurations alone, without a weight and without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

OURS = "lowrank.adapters."
OWN = ("Full", "BitFit")  # of our methods, those that train the base's own parameters
WHOLE = (*OWN, "Bottleneck", "Prefix", "Prompt")  # … or stand around a block or the backbone
FUSED = ("LoRA", "AdaLoRA")  # … or that fused blocks take (fast/site.py): others beside them would keep blocks plain
REBASING = ("pissa", "olora", "loftq")  # starts that change the base


def base_key(tree: Mapping[str, Any]) -> str:
    """Equal for jobs that may train on one base in memory; ``tree`` is a configuration as ``Config.to_dict`` gives it.

    It holds what the base's tensors and its modules' ``forward`` depend on: model, quantisation, device, dtype and
    whether it computes by the fast path. Everything else is put on a job's own twin (models.twin).
    """
    loop = tree["loop"]
    told = {
        "model": tree["model"],
        "quant": tree["quant"],
        "device": loop["device"],
        "fast": loop["fast"],
        "dtype": dtype_key(tree),
    }
    return json.dumps(told, sort_keys=True, default=str)


def dtype_key(tree: Mapping[str, Any]) -> list[str]:
    """What the dtype of the base's dense weights depends on. ``model.dtype=auto`` is bf16 only under bf16, and only for
    a base that is frozen; whether a class of somebody else's trains it, its name alone does not say."""
    dtype, precision = tree["model"].get("dtype", "auto"), tree["loop"]["precision"]
    if dtype != "auto":
        return [dtype]
    if precision in ("fp32", "fp16"):
        return ["fp32"]
    return [precision, *sorted({name if not name.startswith(OURS) else "own" for name in named(tree)})]


def named(tree: Mapping[str, Any]) -> Iterator[str]:
    """The adapter classes that may train parameters of the base."""
    for name in classes(tree):
        if not name.startswith(OURS) or name.rpartition(".")[2] in OWN:
            yield name


def together_key(tree: Mapping[str, Any]) -> str | None:
    """Equal for jobs that may train in one pass (together.py); None for one that trains alone, as ``why_alone`` tells.

    Whatever is a run's own may differ: rank, alpha, targets, start, dropout, learning rate and schedule, seed, data and
    their order, steps. A model of which only its weights tell that it cannot (padded, with experts or a dropout of its
    own) is found out then, and its jobs train alone after all.
    """
    if why_alone(tree) is not None:
        return None
    loop = tree["loop"]
    fused = loop["fast"] and all(name.removeprefix(OURS) in FUSED for name in classes(tree))
    told = [base_key(tree), loop["precision"], loop["gradient_checkpointing"], fused]
    return json.dumps(told)


def why_alone(tree: Mapping[str, Any]) -> str | None:
    """What keeps a job from training in one pass with others; None where nothing does."""
    loop, optim = tree["loop"], tree["optim"]
    for name in classes(tree):
        if name.removeprefix(OURS) in WHOLE:
            return f"{name.removeprefix(OURS)} trains the base itself, or stands around whole blocks"
    for options in rules(tree):
        if options.get("init") in REBASING:
            return f"init={options['init']} changes the base"
    for key, usual in (("compile", "off"), ("offload", False), ("profile", None)):
        if loop.get(key, usual) != usual:
            return f"loop.{key}={loop[key]}"
    if optim.get("in_backward"):
        return "optim.in_backward=true"
    if tree["track"]["kind"] == "wandb":
        return "track=wandb has one run a process"
    return None


def classes(tree: Mapping[str, Any]) -> Iterator[str]:
    """The adapter classes of a job."""
    return (options["_target_"] for options in rules(tree) if "_target_" in options)


def rules(tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a job says of its adapter, and of single targets."""
    adapter = tree["adapter"]
    yield adapter
    targets = adapter.get("targets")
    yield from (options for options in (targets.values() if isinstance(targets, Mapping) else ()) if options)
