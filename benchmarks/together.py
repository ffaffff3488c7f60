"""K adapters in one pass, against one adapter at the same total batch and against K runs one after another.

    python benchmarks/together.py [OVERRIDE…] [--jobs 8] [--rounds 6]

One process, SmolLM2 unless overridden. All three arms train on the same documents: ``together``, K jobs of one example
each in one pass; ``one``, one adapter on the K examples of all of them; ``apart``, the same K jobs one after another.
The arms alternate round by round, back and forth; what is told is the median over rounds of tokens a second and of
their ratios, with the least and the most, then the process's peak and what the ledger says of the group. Where other
processes keep the machine busy, ``--cpu`` counts this thread's own seconds; that needs OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from lowrank import assemble
from lowrank.adapters.inject import apply
from lowrank.assemble import Data, Loaded, Parts
from lowrank.compose import compose
from lowrank.data.pack import joined
from lowrank.keys import Clock
from lowrank.ledger import process
from lowrank.ledger.group import fullest, of_group
from lowrank.ledger.predict import predict
from lowrank.models.twin import twin
from lowrank.record.directory import Log
from lowrank.session.session import Session
from lowrank.sweep.joint import Joint
from lowrank.train import together
from lowrank.train.loop import peak_memory_mb
from lowrank.train.stopping import Stopping


class Joined:
    """The micro-batches of several loops, those of each step as one."""

    def __init__(self, loops: Sequence[Any]) -> None:
        self.orders = [loop.batches for loop in loops]

    def at(self, step: int) -> list[Any]:
        return [joined([batch for order in self.orders for batch in order.at(step)])]


def session(loaded: Loaded, parts: Parts, data: Data) -> Session:
    own = replace(loaded, model=twin(loaded.model))
    made, clock = Session(parts, data, own, Path(os.devnull), Log(), None, Stopping()), Clock(parts.config.loop.seed)
    apply(made.model, parts.plan, parts.config.loop.seed, clock, keep_base=False)
    assemble.quickened(parts, made.model)
    made.loop = made.make_loop(clock)
    return made


def measured(arms: dict[str, Callable[[], int]], rounds: int, now: Callable[[], float]) -> dict[str, list[float]]:
    """Tokens a second of each arm, round by round."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            started = now()
            tokens = arms[name]()
            if number:  # the first takes what only a first pass takes
                rates[name].append(tokens / (now() - started))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    before = process.interpreter(torch.device("cpu"))
    common = ["loop.micro_batch=1", "loop.steps=1000", "checkpoint.every=0", *given.overrides]
    configs = [compose([*common, f"loop.seed={seed}"]) for seed in range(given.jobs)]
    parts = [assemble.parts(config) for config in configs]
    data = assemble.data(configs[0], parts[0].tokenizer)
    loaded = assemble.load(parts[0])
    sessions = [session(loaded, one, data) for one in parts]
    one = session(loaded, parts[0], data)
    loops = [each.loop for each in sessions]
    one.loop.batches = Joined(loops)
    joint = Joint(twin(loaded.model), dict(enumerate(each.model for each in sessions)), parts[0], sessions[0].precision)
    going = dict(enumerate(loops))

    def tokens(loop: Any) -> int:
        return int(loop.state.real_tokens)

    def in_one_pass() -> int:
        first = sum(map(tokens, loops))
        failed = together.once(going, joint, print)
        assert not failed, failed
        return sum(map(tokens, loops)) - first

    def one_adapter() -> int:
        first = tokens(one.loop)
        one.loop.step()
        return tokens(one.loop) - first

    def one_after_another() -> int:
        first = sum(map(tokens, loops))
        for loop in loops:
            loop.step()
        return sum(map(tokens, loops)) - first

    arms = {"together": in_one_pass, "one": one_adapter, "apart": one_after_another}
    rates = measured(arms, given.rounds, time.thread_time if given.cpu else time.perf_counter)
    count = loops[0].state.step
    coming = [[each.order.tokens(n + 1) for n in range(count)] for each in sessions]
    ledger = of_group([predict(each, data, before) for each in parts], fullest(coming))
    print(json.dumps(told(rates, given, parts[0], ledger), indent=2))


def told(rates: dict[str, list[float]], given: Any, parts: Parts, ledger: Any) -> dict[str, Any]:
    ratios = {
        f"together / {name}": [a / b for a, b in zip(rates["together"], rates[name], strict=True)]
        for name in ("one", "apart")
    }
    spread = {
        name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
        for name, found in {**rates, **ratios}.items()
    }
    return {
        "overrides": given.overrides,
        "jobs": given.jobs,
        "rounds": given.rounds,
        "seconds": "of this thread" if given.cpu else "of the clock",
        "precision": parts.precision,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "tokens_per_s": spread,
        "peak_mb": peak_memory_mb(parts.device),
        "predicted_mb": ledger.peak / 1e6,
    }


if __name__ == "__main__":
    main()
