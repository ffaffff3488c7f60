"""A sweep in which jobs crash and are killed, and its launcher is killed too: the same command once more completes it,
and what was done is not done again.

A job knows its fate by its seed, and each start of its training leaves a line in a file of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ordeals.arm import Figure, Row
from benchmarks.ordeals.ground import Ground
from lowrank import compose

ROOT = Path(compose.__file__).resolve().parents[1]
STEPS, PATIENCE = 4, 3600  # seconds
JOB = (
    *("model=tiny_llama", "data=jsonl", "data.fields.response=output", "data.max_length=64", "adapter.r=2"),
    *("loop.micro_batch=2", "loop.device=cpu", "loop.precision=fp32", f"loop.steps={STEPS}", "checkpoint.every=1"),
    *("eval.before=false", "eval.limit=2", "eval.generate.limit=0"),
    *("adapter._target_=fated.Fated", "+adapter.fate='${loop.seed}'"),
)
OPTUNA = (  # which proposes each seed once, and tells the metric of each job that it gets
    *("hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.max_failure_rate=1.0"),
    "sweep.metric=eval.after.loss",
)
CRASH, KILL = 5, 10  # one of so many jobs crashes; of the first half one of so many is killed
FATED = """
import os
import signal
from pathlib import Path

from lowrank.adapters import LoRA
from lowrank.train.hooks import Hook

STARTS = Path(os.environ["FATED"])


class Fated(LoRA):
    def __init__(self, base, *, generator, r, alpha, dropout, rslora, init, freeze_a, fate):
        super().__init__(base, r=r, generator=generator)
        self.fate = fate

    @classmethod
    def hook(cls, adapters, *, steps):
        return Fate(next(iter(adapters.values())).fate)


class Fate(Hook):
    def __init__(self, job):
        self.job, self.before = job, 0

    def after_update(self, step):
        path = STARTS / str(self.job)
        if not self.before:
            with path.open("a") as file:
                file.write(f"{step}\\n")
            self.before = len(path.read_text().splitlines())
        if step == 3 and self.job % CRASH == 1:
            raise RuntimeError(f"job {self.job} was to crash")
        if step == 3 and self.job in KILLED and self.before == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@dataclass(frozen=True)
class Sweep:
    """``folder`` holds the sweep, the adapter's module and the files that starts leave."""

    folder: Path
    data: Path
    count: int
    at_once: int
    optuna: bool = False

    def make(self) -> None:
        (self.folder / "starts").mkdir(parents=True)
        source = f"CRASH, KILLED = {CRASH}, {self.killed}\n{FATED}"
        (self.folder / "fated.py").write_text(source, encoding="utf-8")

    @property
    def crashing(self) -> set[int]:
        return {job for job in range(self.count) if job % CRASH == 1}

    @property
    def killed(self) -> set[int]:
        """Before the launcher is."""
        return {job for job in range(self.count // 2) if job % KILL == 2}

    def begun(self) -> subprocess.Popen[str]:
        seeds = ",".join(map(str, range(self.count)))
        command = [sys.executable, str(ROOT / "train.py"), "-m", *JOB, f"data.path={self.data}"]
        command += [f"loop.seed={seeds}", f"hydra.sweep.dir={self.folder / 'sweep'}"]
        command += [f"hydra.launcher.n_jobs={self.at_once}", "hydra.launcher.threads=1"]
        if self.optuna:
            command += [*OPTUNA, f"hydra.sweeper.n_trials={self.count}", f"hydra.sweeper.n_jobs={2 * self.at_once}"]
        variables = {**os.environ, "PYTHONPATH": str(self.folder), "FATED": str(self.folder / "starts")}
        return subprocess.Popen(
            command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )

    def status(self) -> dict[int, str]:
        """Of each job that has a summary."""
        found = {}
        for path in (self.folder / "sweep").glob("loop.seed=*/summary.json"):
            job = re.match(r"loop\.seed=(\d+)-", path.parent.name)
            assert job is not None
            found[int(job[1])] = str(json.loads(path.read_text(encoding="utf-8"))["status"])
        return found

    def done(self) -> set[int]:
        return {job for job, status in self.status().items() if status == "done"}

    def starts(self) -> dict[int, int]:
        """How often the training of each job began or went on."""
        return {int(p.name): len(p.read_text().splitlines()) for p in (self.folder / "starts").iterdir()}


def rows(ground: Ground, count: int, *, optuna: bool = False) -> Iterator[Row]:
    sweep = Sweep(ground.place("optuna" if optuna else "sweep"), ground.ours.data, count, ground.at_once, optuna)
    sweep.make()
    kept = first_call(sweep)
    before = sweep.starts()
    process = sweep.begun()
    _, errors = process.communicate(timeout=PATIENCE)
    ended = {job: fault(sweep, job, errors) for job in range(count)}
    what = f"{'Optuna: ' if optuna else ''}a sweep of {count} jobs"
    title = f"{what}: {len(sweep.crashing)} crash, {len(sweep.killed)} are killed, its launcher is killed"
    yield Row(f"{title}; called again, the rest are done, those named", figure(ended, process.returncode))
    again = {job: repeated(sweep, job, before.get(job, 0), job in kept) for job in range(count)}
    yield Row("… and no job is run that was done, none more often than it was stopped", figure(again, 1))


def first_call(sweep: Sweep) -> set[int]:
    """The jobs that are done when the launcher of the first call has died, after a half of them, and all of its jobs
    with it."""
    process, until = sweep.begun(), time.monotonic() + PATIENCE
    assert process.stderr is not None
    while len(ended := sweep.status()) < sweep.count // 2 or not sweep.killed <= ended.keys():
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"a sweep that was to be killed was not:\n{process.stderr.read()}")
        time.sleep(0.05)
    process.kill()
    process.stderr.read()  # to its end: whoever has the other end, the jobs, has ended
    process.wait()
    return sweep.done()


def fault(sweep: Sweep, job: int, errors: str) -> str:
    """What is not as it must be in the end."""
    status, named = sweep.status().get(job, "none"), f"/loop.seed={job}-" in errors
    wanted = ("failed", True) if job in sweep.crashing else ("done", False)
    return "" if (status, named) == wanted else f"{status}, {'named' if named else 'not named'}: {errors[-300:]}"


def repeated(sweep: Sweep, job: int, before: int, kept: bool) -> str:
    """A job that was done starts no more; one that crashed, was killed, or was stopped with the launcher, once."""
    more = sweep.starts().get(job, 0) - before
    return "" if more <= (0 if kept else 1) else f"started {more} more times after {before}"


def figure(faults: dict[int, str], code: int) -> Figure:
    wrong = [f"job {job}: {why}" for job, why in faults.items() if why]
    return Figure(len(faults), wrong if code == 1 else [*wrong, f"exit code {code}"])
