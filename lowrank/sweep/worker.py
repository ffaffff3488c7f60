"""Jobs one after another in a process that keeps their base: ``python -m lowrank.sweep.worker DESCRIPTOR``.

Requests are lines of JSON on standard input, answers such lines on the descriptor (served.py says which). A signal
stops the jobs as it stops a run, and the worker with them; so does the end of the input, between two requests.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lowrank import compose, config
from lowrank.sweep.death import end_with_launcher
from lowrank.train.stopping import Stopping

if TYPE_CHECKING:  # they import torch
    from lowrank.sweep.resident import Resident
    from lowrank.sweep.together import Job

Told = Mapping[str, Any]  # of a job: {"config", "folder", "command"}
PEAK = Path("/proc/self/clear_refs")  # to which a 5 sets VmHWM to what VmRSS is (proc(5))
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    descriptor = int((arguments or sys.argv[1:])[0])
    os.set_inheritable(descriptor, False)  # nobody whom a job starts has a part in this
    gc.set_threshold(50_000)  # as in train.py
    stopping = Stopping()
    with stopping.held(), compose.reporting():
        end_with_launcher()
        stopping.install()
        with os.fdopen(descriptor, "w", encoding="utf-8") as answers, own_input() as requests:
            serve(requests, answers, stopping)
        if stopping.asked:
            sys.exit(INTERRUPTED)


@contextmanager
def own_input() -> Iterator[IO[bytes]]:
    """The standard input for us alone: a job that reads it finds the end of a file."""
    with os.fdopen(os.dup(0), "rb") as requests, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        yield requests


def serve(requests: IO[bytes], answers: IO[str], stopping: Stopping) -> None:
    """Until the end of the input, or a signal."""
    from lowrank.sweep.resident import Resident
    from lowrank.sweep.settings import Settings

    resident, settings = Resident(), Settings.now()
    while not stopping.asked:
        with stopping.at_once():
            line = requests.readline()
        if not line.strip():
            return
        asked = json.loads(line)
        with printing(asked.get("output")):
            for answer in carried_out(asked["jobs"], resident, stopping):
                tell(answers, answer)
        settings.put_back()
        tidy()
        tell(answers, {"idle": True})


def tell(answers: IO[str], what: Mapping[str, Any]) -> None:
    with suppress(BrokenPipeError):  # whoever asked is gone, which is another's to notice
        print(json.dumps(what), file=answers, flush=True)


def carried_out(jobs: Sequence[Told], resident: Resident, stopping: Stopping) -> Iterator[dict[str, Any]]:
    """The answer to each job, when it has ended."""
    if len(jobs) > 1:
        yield from several(jobs, resident, stopping)
    else:
        yield from (answer(job, lambda job=job: alone(job, resident, stopping)) for job in jobs)  # type: ignore[misc]


def answer(job: Told, do: Callable[[], object]) -> dict[str, Any]:
    """What is told of a job of which this is all, or the last; an error is reported as train.py does."""
    code, cause = 0, ""
    try:
        do()
    except (Exception, KeyboardInterrupt) as error:
        compose.discard(Path(job["folder"]))
        code, cause = compose.told(error)
    return {"folder": job["folder"], "code": code, "cause": cause}


def alone(job: Told, resident: Resident, stopping: Stopping) -> None:
    """What train.py does."""
    from lowrank import run
    from lowrank.report import terminal

    done = run.train(config.parse(job["config"]), job["folder"], job["command"], stopping, resident)
    terminal.closing(done.folder, done.summary, done.samples)


def several(jobs: Sequence[Told], resident: Resident, stopping: Stopping) -> Iterator[dict[str, Any]]:
    """In one pass; a job whose configuration is refused is not in it."""
    from lowrank.sweep.together import train_together

    made: list[tuple[Told, Job]] = []
    for job in jobs:
        refused = answer(job, lambda job=job: made.append((job, task(job))))  # type: ignore[misc]
        if refused["code"]:
            yield refused
    for ended in train_together([one for _, one in made], resident, stopping):
        yield answer(made[ended.number][0], lambda ended=ended: close(made[ended.number][1].folder, ended.error))  # type: ignore[misc]


def task(job: Told) -> Job:
    from lowrank.sweep.together import Job

    return Job(config.parse(job["config"]), Path(job["folder"]), job["command"])


def close(folder: Path, error: BaseException | None) -> None:
    """What stands at the end of a run's output."""
    from lowrank import run
    from lowrank.report import terminal

    if error is not None:
        raise error
    done = run.open(folder)
    terminal.closing(folder, done.summary, done.samples)


@contextmanager
def printing(path: str | None) -> Iterator[None]:
    """Inside, all that is printed goes to the end of a file, where one is named."""
    if path is None:
        yield
        return
    before = [os.dup(number) for number in (1, 2)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "ab") as file:
            turn([file.fileno()] * 2)
        yield
    finally:
        turn(before)
        for number in before:
            os.close(number)


def turn(descriptors: Sequence[int]) -> None:
    """Lets standard output and standard error go where these descriptors do."""
    for stream, number, descriptor in zip((sys.stdout, sys.stderr), (1, 2), descriptors, strict=True):
        stream.flush()
        os.dup2(descriptor, number)


def tidy() -> None:
    """Nothing of a job is left in memory, and its peak is not the next one's."""
    import torch

    from lowrank.fast import heap

    gc.collect()
    heap.give_back()
    with suppress(OSError):  # not on Linux
        PEAK.write_text("5", encoding="ascii")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
