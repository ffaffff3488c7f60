"""Sweeps of jobs that take milliseconds: processes as the launcher starts them, that do what their overrides say, and
a worker that speaks the protocol without loading anything."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from lowrank.report.board import Board
from lowrank.schema import Sweep
from lowrank.sweep.course import Course
from lowrank.sweep.job import Job
from lowrank.sweep.lanes import Lane, Lanes
from lowrank.sweep.origin import Origin
from lowrank.sweep.schedule import Schedule

DOING = '''
import json, os, signal, sys, time
from pathlib import Path

def summarise(folder, status):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("")
    (folder / "summary.json").write_text(json.dumps({"status": status, "loss": 0.5}))

def do(what, folder):
    """Leaves a line in ../starts of when it began; returns the exit code."""
    folder, resumed = Path(folder), (Path(folder) / "config.yaml").exists()
    with open(folder.parent / "log", "a") as log:
        log.write(f"{folder.name} {os.getpid()} {time.monotonic()} ")
        log.flush()
    match what.partition("=")[::2]:
        case "exit", code:
            return int(code)
        case "kill", _ if not resumed:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        case "sleep", seconds:
            stopped = []
            signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
            until = time.monotonic() + float(seconds)
            while time.monotonic() < until and not stopped:
                time.sleep(0.005)
            if stopped:
                summarise(folder, "interrupted")
                return 130
    summarise(folder, "done")
    return 0
'''
PROCESS = f"""{DOING}
from lowrank.sweep.death import end_with_launcher
end_with_launcher()
code = do(sys.argv[1], sys.argv[-1])
if code:
    Path(os.environ["LOWRANK_CAUSE"]).write_text(f"it had to end with {{code}}")
sys.exit(code)
"""
WORKER = f"""{DOING}
answers = os.fdopen(int(sys.argv[1]), "w")
def tell(**what):
    print(json.dumps(what), file=answers, flush=True)
for line in sys.stdin:
    for job in json.loads(line)["jobs"]:
        code = do(job["config"]["adapter"]["does"], job["folder"])
        tell(folder=job["folder"], code=code, cause=f"it had to end with {{code}}" if code else "")
    tell(idle=True)
"""
CONFIG = {  # of a configuration what a worker's launcher asks for
    "model": {"kind": "tiny"},
    "quant": {"kind": "none"},
    "loop": {"device": "cpu", "fast": True, "precision": "fp32", "gradient_checkpointing": "off"},
    "optim": {"lr": 1e-3},
    "checkpoint": {"resume": False},
    "track": {"kind": "none"},
}


def jobs(folder: Path, *doing: str, code: str = "code", base: str = "tiny") -> list[Job]:
    """``doing``: done, exit=CODE, kill (the first time), sleep=SECONDS."""
    (folder / "process.py").write_text(PROCESS)
    start = (sys.executable, str(folder / "process.py"))
    made = []
    for number, what in enumerate(doing):
        origin = Origin(f"{number} {what}", code, "data", "base")
        place = folder / "sweep" / f"{number}-{origin.digest}"
        config = {**CONFIG, "model": {"kind": base}, "adapter": {"_target_": "lowrank.adapters.LoRA", "does": what}}
        made.append(Job(number, (what,), f"n={number}", place, config, origin, start, (str(place),)))
    return made


def sweep(made: Sequence[Job], n_jobs: int = 1, settings: Sweep | None = None) -> tuple[Schedule, io.StringIO]:
    """What would run them, and what it will have said."""
    folder, said = made[0].folder.parent, io.StringIO()
    folder.mkdir(exist_ok=True)
    (folder.parent / "worker.py").write_text(WORKER)
    board = Board([(job.shown, job.folder) for job in made], said)
    lanes = Lanes([Lane(number) for number in range(n_jobs)], weighed=False)
    schedule = Schedule(made, lanes, settings or Sweep(), folder, board, quiet=True)
    schedule.command = (sys.executable, str(folder.parent / "worker.py"))
    return schedule, said


def ran(made: Sequence[Job], n_jobs: int = 1, settings: Sweep | None = None) -> tuple[list[Course], str]:
    schedule, said = sweep(made, n_jobs, settings)
    courses = schedule.run()
    for lane in schedule.lanes:
        lane.leave()
    return courses, said.getvalue()


def starts(folder: Path) -> list[tuple[str, int]]:
    """(job's number, process) of every start."""
    words = (folder / "sweep/log").read_text().split()
    return [(words[i].partition("-")[0], int(words[i + 1])) for i in range(0, len(words), 3)]
