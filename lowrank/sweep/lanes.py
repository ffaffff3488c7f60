"""The lanes of a sweep, in each of which one thing runs at a time: how many, on which device, with how many threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank.sweep.fresh import Fresh
from lowrank.sweep.job import Job
from lowrank.sweep.served import Served

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass
class Lane:
    number: int
    variables: dict[str, str] = field(default_factory=dict)  # of the environment of what runs in it
    running: Fresh | Served | None = None

    def leave(self) -> None:
        """Lets go of what has nothing left to do."""
        if self.running is not None:
            self.running.close()
            self.running = None

    @property
    def busy(self) -> bool:
        return self.running is not None and self.running.busy


@dataclass(frozen=True)
class Lanes:
    """``weighed``: whether memory is asked for before a job joins another; where the user says how many, it is not."""

    each: list[Lane]
    weighed: bool


def lanes(jobs: Sequence[Job], n_jobs: int | None, threads: int | None) -> Lanes:
    """As many as are of use. Whatever the number, a job computes the same."""
    pinned = {name: str(threads) for name in THREADS} if threads else {}
    devices = visible(jobs)
    count = n_jobs or len(devices) or max(1, cores() // (threads or plain_threads()))
    count = max(1, min(count, len(jobs)))
    shown = [{VISIBLE: devices[i % len(devices)]} if devices else {} for i in range(count)]
    return Lanes([Lane(i, {**pinned, **shown[i]}) for i in range(count)], not n_jobs and not devices and count > 1)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plain_threads() -> int:
    """Of a run by itself."""
    given = os.environ.get(THREADS[0], "")
    return int(given) if given.isdecimal() and int(given) > 0 else cores()


def visible(jobs: Sequence[Job]) -> list[str]:
    """The GPUs to share out, as CUDA_VISIBLE_DEVICES names them; none where a job computes on the CPU or names its
    own."""
    wanted: set[Any] = {job.config["loop"]["device"] for job in jobs}
    if not wanted <= {"auto", "cuda"}:
        return []
    import torch  # which the check of the jobs' classes has imported already

    given = os.environ.get(VISIBLE)
    there = given.split(",") if given is not None else [str(i) for i in range(torch.cuda.device_count())]
    return [name.strip() for name in there if name.strip()] if torch.cuda.is_available() else []
