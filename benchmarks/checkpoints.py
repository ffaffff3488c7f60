"""What a checkpoint every ten steps costs the demo: none, in the foreground and in the background, side by side.

    python benchmarks/checkpoints.py

One process on one model: the demo's first ten steps again and again, in turn without a checkpoint and with one after
the first of them by either writer, so that what is written beside the steps is written beside these. Prints, for each
writer, the median of the ratios of neighbouring blocks with their spread, and the seconds that a save keeps the loop
waiting. A block ends when the last of its files is on the disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lowrank import compose
from lowrank.record.directory import Log
from lowrank.run import assembled
from lowrank.session.session import Session
from lowrank.train.background import Background, Foreground
from lowrank.train.checkpoint import Checkpoints
from lowrank.train.hooks import Hook
from lowrank.train.stopping import Stopping

STEPS = 10  # of a block: checkpoint.every
WRITERS: dict[str, Any] = {"foreground": Foreground, "background": Background}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="blocks of each kind (7)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch (all)")
    parser.add_argument("overrides", nargs="*", help="as for train.py, after experiment=demo")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=Path.cwd()) as folder:  # the disk that runs lie on
        session = begun(Path(folder), arguments.overrides)
        kinds = {"none": None, **{name: saving(session, Path(folder) / name, name) for name in WRITERS}}
        block(session, None)  # the first touches memory for the first time
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(arguments.repeats):
            for name, checkpoints in kinds.items():
                seconds[name].append(block(session, checkpoints))
        for timed in filter(None, kinds.values()):
            timed.checkpoints.close()
        session.watching.close()
    for name in WRITERS:
        ratios = [with_it / without for with_it, without in zip(seconds[name], seconds["none"], strict=True)]
        waits = kinds[name].waits
        print(
            f"{name}: a block of {STEPS} steps takes {statistics.median(ratios):.3f} times as long "
            f"({min(ratios):.3f} to {max(ratios):.3f}); a save keeps the loop waiting {statistics.median(waits):.3f} s"
        )


def begun(folder: Path, overrides: list[str]) -> Any:
    """A session of the demo that could go on with step 1; its own hooks stay away."""
    config = compose.compose(["experiment=demo", "eval.before=false", *overrides])
    log = Log()
    session = Session(*assembled(config, log), folder / "run", log, None, Stopping())
    (folder / "run").mkdir()
    session.prepare()
    session.begin(None)
    return session


class Timed(Hook):
    """A checkpoint hook, and how long each of its saves kept the loop."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.waits: list[float] = []

    def after_step(self, record: Any) -> None:
        started = time.perf_counter()
        if record.step == 1:
            self.checkpoints.begin(record.step)
            self.waits.append(time.perf_counter() - started)


def saving(session: Any, folder: Path, name: str) -> Timed:
    watching = session.watching
    beside = (watching.metrics.path, watching.digests.path)
    made = Checkpoints(
        folder,
        watching.snapshot,
        every=1,
        keep=2,
        last=0,
        trained=session.loop.parameters,
        beside=beside,
        writer=WRITERS[name](),
    )
    return Timed(made)


def block(session: Any, timed: Timed | None) -> float:
    """Seconds of the demo's steps 1 to ten, whatever was trained before."""
    loop = session.loop
    loop.state.step = loop.state.position = 0
    loop.hooks = [timed] if timed else []
    started = time.perf_counter()
    loop.run(STEPS)
    if timed is not None:
        timed.checkpoints.wait()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
