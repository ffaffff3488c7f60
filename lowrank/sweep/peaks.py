"""What jobs will take, by the ledger: ``python -m lowrank.sweep.peaks``, a process beside the first job.

It reads a JSON list of configurations, and writes what this machine has room for and then a line for each in turn:
bytes, or null where the prediction fails, as the job itself then will.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from subprocess import DEVNULL, PIPE
from tempfile import TemporaryFile
from typing import Any

from lowrank.sweep.death import end_with_launcher
from lowrank.sweep.fresh import started
from lowrank.sweep.job import Job

# What a peak does not depend on: jobs that differ in nothing else are predicted once.
WEIGHTLESS = ("loop.seed", "loop.steps", "optim.lr", "optim.weight_decay", "schedule", "checkpoint", "track")


class Peaks:
    """The predictions as they come."""

    def __init__(self, jobs: Sequence[Job], variables: Mapping[str, str]) -> None:
        self.keys = [weighty(job.config) for job in jobs]
        distinct = dict(zip(reversed(self.keys), reversed([job.config for job in jobs]), strict=True))
        self.asked, self.told, self.unread = list(dict.fromkeys(self.keys)), list[int](), b""
        with TemporaryFile() as file:
            file.write(json.dumps([distinct[key] for key in self.asked]).encode())
            file.seek(0)
            command = [sys.executable, "-P", "-m", "lowrank.sweep.peaks"]
            self.process = started(command, variables, stdin=file, stdout=PIPE, stderr=DEVNULL)
        assert self.process.stdout is not None
        self.answers = self.process.stdout.fileno()
        os.set_blocking(self.answers, False)

    def read(self) -> None:
        with suppress(BlockingIOError):
            while piece := os.read(self.answers, 1 << 16):
                self.unread += piece
        *whole, self.unread = self.unread.split(b"\n")
        self.told += [int(line) if line.strip().isdigit() else 0 for line in whole]

    def fits(self, place: int, beside: Sequence[int]) -> bool:
        """Whether there is room for a job beside those that run; not as long as that is unknown."""
        self.read()
        room, known = self.told[:1], dict(zip(self.asked, self.told[1:], strict=False))
        wanted = [known.get(self.keys[one]) for one in (place, *beside)]
        return bool(room) and None not in wanted and sum(size for size in wanted if size is not None) <= room[0]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def weighty(config: Mapping[str, Any]) -> str:
    tree = {group: dict(values) for group, values in config.items()}
    for path in WEIGHTLESS:
        group, _, key = path.partition(".")
        tree[group].pop(key) if key else tree.pop(group)
    return json.dumps(tree, sort_keys=True)


def main() -> None:
    end_with_launcher()
    asked = json.load(sys.stdin)
    import torch

    from lowrank import config
    from lowrank.ledger.dry import DryRun
    from lowrank.ledger.room import room

    print(room(torch.device("cpu")), flush=True)
    for tree in asked:
        try:
            print(DryRun(config.parse(tree)).ledger.peak, flush=True)
        except Exception:  # whatever it is, the job meets it too and says it
            print("null", flush=True)


if __name__ == "__main__":
    main()
