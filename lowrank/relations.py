"""What must hold between keys of the configuration: which belong to which choice, and what goes with what."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

# Keys that mean something for some choices of their group only; elsewhere they must keep their default.
OWNERS: dict[str, tuple[str, ...]] = {
    "model.name": ("hf",),
    "model.revision": ("hf",),
    "quant.double": ("nf4",),
    "quant.compute_dtype": ("nf4",),
    "quant.skip": ("nf4",),
    "data.path": ("jsonl", "csv"),
    "data.eval_path": ("jsonl", "csv"),
    "data.fields": ("jsonl", "csv"),
    "data.on_malformed": ("jsonl", "csv"),
    "track.project": ("tensorboard", "wandb", "own"),
    "track.name": ("tensorboard", "wandb", "own"),
    "track._target_": ("own",),
}


# Between keys: the key an error names, what must hold of the whole configuration, and the error's second half.
Relation = tuple[str, Callable[[Any], bool], str]
RELATIONS: tuple[Relation, ...] = (
    ("model.name", lambda c: c.model.kind != "hf" or c.model.name is not None, "a folder or a hub id"),
    ("data.path", lambda c: c.data.kind == "stdlib" or c.data.path is not None, "a file"),
    (
        "data.fields.instruction",
        lambda c: c.data.template == "plain" or c.data.fields.instruction is not None,
        "a column's name, unless data.template=plain",
    ),
    (
        "data.fields.response",
        lambda c: c.data.template == "plain" or c.data.fields.response is not None,
        "a column's name, unless data.template=plain",
    ),
    (
        "data.fields.text",
        lambda c: c.data.template != "plain" or c.data.fields.text is not None,
        "a column's name, because data.template=plain",
    ),
    (
        "loop.steps",
        lambda c: (c.loop.steps is None) != (c.loop.epochs is None),
        "exactly one of loop.steps and loop.epochs, the other null",
    ),
    (
        "loop.micro_batch",
        lambda c: (c.loop.micro_batch is None) != (c.loop.micro_batch_tokens is None),
        "exactly one of loop.micro_batch and loop.micro_batch_tokens, the other null",
    ),
    (
        "loop.compile",
        lambda c: c.loop.compile == "off" or c.loop.gradient_checkpointing == "off",
        "off, unless loop.gradient_checkpointing=off",
    ),
    (
        "loop.offload",
        lambda c: not c.loop.offload or c.loop.gradient_checkpointing == "block",
        "false, unless loop.gradient_checkpointing=block",
    ),
    (
        "optim.in_backward",
        lambda c: not c.optim.in_backward or c.loop.accumulate == 1,
        "false, unless loop.accumulate=1: a parameter moves at its first gradient",
    ),
    (
        "optim.in_backward",
        lambda c: not c.optim.in_backward or c.loop.max_grad_norm == math.inf,
        "false, unless loop.max_grad_norm=.inf: the norm is known when all parameters have moved",
    ),
    (
        "optim.in_backward",
        lambda c: not c.optim.in_backward or c.loop.precision != "fp16",
        "false, unless loop.precision is bf16, fp32 or auto: fp16's loss scale needs a way back",
    ),
    (
        "loop.patience",
        lambda c: c.loop.patience is None or c.eval.every > 0,
        "null, unless eval.every says when to evaluate",
    ),
    (
        "loop.prune",
        lambda c: c.loop.prune is None or c.eval.every > 0,
        "null, unless eval.every says when to evaluate",
    ),
    (
        "eval.generate.num_return_sequences",
        lambda c: c.eval.generate.do_sample or c.eval.generate.num_return_sequences == 1,
        "1, unless eval.generate.do_sample=true",
    ),
)
