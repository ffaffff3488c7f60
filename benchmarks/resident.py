"""A step with several adapters on the model, one of which trains: ``python -m benchmarks.resident FOLDER COUNT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import lowrank
from benchmarks import task
from benchmarks.arm import now, peak_mb
from lowrank import assemble, compose, fast
from lowrank.adapters.inject import named_trainable
from lowrank.keys import Clock
from lowrank.train.precision import Precision


def main(folder: Path, count: int) -> None:
    work = task.read(folder)
    config = compose.compose(work.overrides)
    parts = assemble.parts(config)
    data, loaded = assemble.data(config, parts.tokenizer), assemble.load(parts)
    model, clock = loaded.model, Clock(config.loop.seed)
    for number in range(count):
        lowrank.apply(model, parts.plan, seed=number, clock=clock, name=f"a{number}")
        if number:
            lowrank.freeze(model, f"a{number}")
    lowrank.use(model, "a0")
    note = fast.fuse(model) if config.loop.fast else ""
    order, loss = assemble.batches(config, data, loaded.collate), assemble.loss(config)
    trained = [p for p in named_trainable(model).values() if p.requires_grad]
    optimizer, precision = torch.optim.AdamW(trained, fused=True), Precision(parts.precision, parts.device)
    seconds, tokens = [], []
    model.train()
    for step in range(1, work.steps + 1):
        started = now(work.device)
        [batch] = order.at(step)
        clock.set(step, 0)
        with precision.autocast():
            total = loss(model, batch.to(parts.device))
        (total / len(batch.targets)).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.loop.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(now(work.device) - started)
        tokens.append(batch.real_tokens)
    timed = slice(work.warmup, None)
    speed = sum(tokens[timed]) / sum(seconds[timed])
    print(json.dumps({"tokens_per_s": speed, "peak_mb": peak_mb(work.device), "note": note}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
