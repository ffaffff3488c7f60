"""``jobs.jsonl`` in a sweep's folder: which jobs were started there, what they are made of, and how each ended."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowrank.record.directory import json_line
from lowrank.sweep.job import Job
from lowrank.sweep.origin import Origin

FILE = "jobs.jsonl"


class Journal:
    """Lines are only ever added, each by one write: several launchers may have one sweep. What is asked is what stood
    there at first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.starts = list(self.read())

    def started(self, job: Job, *, resume: bool) -> None:
        self.add("start", job, resume=resume, origin=asdict(job.origin))

    def ended(self, job: Job, status: str, cause: str) -> None:
        self.add("end", job, status=status, **({"cause": cause} if cause else {}))

    def latest(self, folder: Path) -> Origin | None:
        """What the run was made of that was last started in a folder of the sweep."""
        return next((origin for _, name, origin in reversed(self.starts) if name == folder.name), None)

    def differs(self, job: Job) -> str:
        """``code differs from adapter.r=4-1a2b3c4d: runs again``, of a job that once ran in another folder."""
        for shown, name, origin in reversed(self.starts):
            if shown == job.shown and name != job.folder.name:
                what = job.origin.differing(origin)
                return f"{' and '.join(what)} differ{'s' * (len(what) == 1)} from {name}: runs again" if what else ""
        return ""

    def add(self, event: str, job: Job, **more: Any) -> None:
        told = {"event": event, "job": job.number, "overrides": job.shown, "folder": job.folder.name}
        line = json_line({**told, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **more})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, f"{chr(10) if torn else ''}{line}".encode())
        finally:
            os.close(descriptor)

    def read(self) -> Iterator[tuple[str, str, Origin]]:
        """(overrides, folder, what it was made of) of every start; a torn line is no line."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                told = json.loads(line)
                yield told["overrides"], told["folder"], Origin(**told["origin"])
            except (ValueError, TypeError, KeyError):
                continue
