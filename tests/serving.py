"""A worker of a sweep, as a launcher has it: jobs are sent to it, and what it says of them is read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cli import ROOT, environment

from lowrank import compose


@dataclass(frozen=True)
class Worker:
    process: subprocess.Popen[str]
    answers: IO[str]

    def send(self, *jobs: Mapping[str, Any], output: Path | None = None) -> None:
        assert self.process.stdin is not None
        asked = {"jobs": jobs, **({"output": str(output)} if output else {})}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()

    def told(self) -> list[dict[str, Any]]:
        """The answers until it is idle, or gone."""
        found = []
        for line in self.answers:
            answer = json.loads(line)
            if "idle" in answer:
                break
            found.append(answer)
        return found

    def run(self, *jobs: Mapping[str, Any], output: Path | None = None) -> list[dict[str, Any]]:
        self.send(*jobs, output=output)
        return self.told()

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(output: Path, command: Sequence[str] = ("-m", "lowrank.sweep.worker"), **more: str) -> Iterator[Worker]:
    """A worker whose output, both streams, goes to a file; at the end its input is closed and it must leave."""
    ours, theirs = os.pipe()
    with output.open("wb") as file, os.fdopen(ours, encoding="utf-8") as answers:
        process = subprocess.Popen(
            [sys.executable, *command, str(theirs)],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            pass_fds=(theirs,),
            env=environment(**more),
            cwd=ROOT,
            text=True,
        )
        os.close(theirs)
        try:
            yield Worker(process, answers)
            process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()


def job(folder: Path, *overrides: str) -> dict[str, Any]:
    """What a launcher sends of ``python train.py OVERRIDES hydra.run.dir=FOLDER``."""
    tree = compose.compose([*overrides]).to_dict()
    return {"config": tree, "folder": str(folder), "command": "python train.py " + " ".join(overrides)}
