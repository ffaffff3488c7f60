"""Predictions that this process has made, for runs that take the same: jobs of a sweep that one process trains."""

from __future__ import annotations

import json
import traceback
from dataclasses import replace
from typing import Any

from lowrank.assemble import Data, Parts
from lowrank.ledger.calibrate import cached
from lowrank.ledger.ledger import Ledger
from lowrank.ledger.predict import predict
from lowrank.record.directory import Log

MOST = 8
# What no byte and no FLOP depends on; of methods of our own, a scale neither.
WEIGHTLESS = ("optim.lr", "optim.weight_decay", "schedule", "checkpoint", "track", "eval.every", "eval.before")
SCALES = ("adapter.alpha",)
made: list[tuple[str, Data | None, Ledger]] = []  # the newest last


def foretold(parts: Parts, data: Data | None, interpreter: int, log: Log) -> Ledger | None:
    """``remembered``, told of in a line, with the tokens a second where this machine was measured for the same before.
    A model whose code cannot run without values may train all the same: what is wrong is then said, with its traceback
    in the log's file, and there is no prediction."""
    try:
        ledger = remembered(parts, data, interpreter)
        if (speed := cached(parts, data)) is not None:
            ledger = replace(ledger, tokens_per_s=speed.tokens_per_s)
    except Exception as failed:
        log.say(f"memory: no prediction ({type(failed).__name__}: {str(failed).partition(chr(10))[0]})")
        log.note(traceback.format_exc())
        return None
    log.say(ledger.line)
    return ledger


def remembered(parts: Parts, data: Data | None, interpreter: int) -> Ledger:
    """``predict``; of a run like one that was predicted on the same data, that one's ledger in this process."""
    key = key_of(parts)
    for known, its_data, ledger in made:
        if known == key and its_data is data:
            return in_process(ledger, interpreter)
    ledger = predict(parts, data, interpreter)
    made.append((key, data, ledger))
    del made[:-MOST]
    return ledger


def key_of(parts: Parts) -> str:
    tree: dict[str, Any] = parts.config.to_dict()
    ours = str(tree["adapter"]["_target_"]).startswith("lowrank.adapters.")
    for path in (*WEIGHTLESS, *(SCALES if ours else ())):
        group, _, key = path.partition(".")
        if key:
            tree[group].pop(key, None)
        else:
            tree.pop(group)
    return json.dumps([tree, str(parts.device), parts.precision, str(parts.dtype)], sort_keys=True, default=str)


def in_process(ledger: Ledger, interpreter: int) -> Ledger:
    """The same in a process of so many bytes; they are there in every phase."""
    more = interpreter - ledger.parts["interpreter"]
    phases = {name: size + more for name, size in ledger.phases.items()}
    return replace(ledger, parts={**ledger.parts, "interpreter": interpreter}, phases=phases)
