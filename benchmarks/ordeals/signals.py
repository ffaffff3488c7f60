"""SIGTERM at random moments of a run's life: the run stops, and goes on exactly.

A few more go to ``python train.py`` itself, after a random time: most of that is spent importing.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.ordeals import forks
from benchmarks.ordeals.arm import Arm, Figure, Row
from benchmarks.ordeals.forks import Ended
from benchmarks.ordeals.ground import Ground
from benchmarks.ordeals.kills import MISSED, outcome
from benchmarks.ordeals.ours import SMALL
from lowrank import compose

GRACE = 0.02  # seconds that the Trainer waits after a signal before it asks for a checkpoint (3 by default)
ROOT = Path(compose.__file__).resolve().parents[1]


def rows(ground: Ground, count: int, processes: int) -> Iterator[Row]:
    title = "SIGTERM at a random moment: 130, or death before training; resumed, ends in the same bits"
    yield Row(title, *(terminated(ground, arm, count) for arm in (ground.ours, *peers(ground))))
    if processes:
        draw = random.Random(ground.seed)
        life = process_lifetime(ground)
        points = [(number, draw.uniform(0, life)) for number in range(processes)]
        whole = ground.ours.ended(ground.run("whole", ground.ours))
        yield Row(
            "… to python train.py itself, its imports included",
            ground.judged(points, partial(real, ground, whole)),
        )


def peers(ground: Ground) -> list[Arm]:
    """The Trainer as it heeds SIGTERM, when it is told to."""
    if ground.peer is None:
        return []

    def hurry(trainer: Any) -> None:
        for callback in trainer.callback_handler.callbacks:
            if getattr(callback, "jit_manager", None):
                callback.jit_manager.kill_wait = GRACE

    return [ground.peer.with_(enable_jit_checkpoint=True).preparing(hurry)]


def terminated(ground: Ground, arm: Arm, count: int) -> Figure:
    """Signals that come when the process has ended already are no points: more are drawn than are needed."""
    whole, life = arm.ended(ground.run("whole", arm)), lifetime(ground, arm)
    draw = random.Random(ground.seed)
    points = [(number, round(draw.uniform(0, life), 4)) for number in range(2 * count)]
    judging = ground.each(points, partial(judge, ground, arm, whole))
    hit = list(islice(((point, fault) for point, fault in judging if fault != MISSED), count))
    return Figure(len(hit), [f"{point}: {fault}" for point, fault in hit if fault])


def lifetime(ground: Ground, arm: Arm) -> float:
    """Seconds of a run in a forked process, now that the machine's caches are warm."""
    folder, started = ground.place(f"life {arm.name}"), time.monotonic()
    forks.child(partial(arm.program, folder))
    return time.monotonic() - started


def judge(ground: Ground, arm: Arm, whole: dict[str, str], point: tuple[int, float]) -> str:
    folder = ground.place(f"term {arm.name} {point[0]}")
    with tempfile.TemporaryFile() as output:
        number = forks.fork(partial(arm.program, folder), output.fileno())
        time.sleep(point[1])
        over = os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        os.kill(number, signal.SIGTERM)
        code = forks.waited(number, time.monotonic() + forks.SECONDS)
        output.seek(0)
        stopped = Ended(code, output.read().decode(errors="replace"))
    return MISSED if over else judged(arm, folder, stopped, whole)


def judged(arm: Arm, folder: Path, stopped: Ended, whole: dict[str, str]) -> str:
    fault = ending(arm, folder, stopped) if arm.name == "lowrank" else ""
    newest = arm.newest(folder)
    again = forks.child(partial(arm.again, folder))
    fault = "; ".join(found for found in (fault, outcome(arm, folder, newest, again, whole)) if found)
    shutil.rmtree(folder, ignore_errors=True)
    return fault


def ending(arm: Arm, folder: Path, stopped: Ended) -> str:
    """What is wrong with how the signal ended it: with 130, saved and said to be interrupted where it had begun to
    train; with the signal itself where it could not yet, or no longer, be heard; with 0 when all was done but that."""
    status, trained = arm.ended(folder)["status"], (folder / "checkpoints").exists()
    match stopped.code:
        case 130:
            right = status in (("interrupted", "done") if trained else ("none",)) and "Traceback" not in stopped.output
        case 0:
            right = status == "done"
        case _:
            right = stopped.code == -signal.SIGTERM and (status == "done" or not trained)
    return "" if right else f"exit code {stopped.code}, status {status}: {stopped.output[-400:]}"


def command(ground: Ground, folder: Path) -> list[str]:
    overrides = [*SMALL, f"data.path={ground.ours.data}", f"hydra.run.dir={folder}"]
    return [sys.executable, str(ROOT / "train.py"), *overrides]


def process_lifetime(ground: Ground) -> float:
    """Seconds that ``python train.py`` takes here."""
    started = time.monotonic()
    subprocess.run(command(ground, ground.place("lifetime")), check=True, capture_output=True, cwd=ROOT)
    return time.monotonic() - started


def real(ground: Ground, whole: dict[str, str], point: tuple[int, float]) -> str:
    folder = ground.place(f"process-{point[0]}")
    process = subprocess.Popen(
        command(ground, folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    time.sleep(point[1])
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=forks.SECONDS)
    return judged(ground.ours, folder, Ended(process.returncode, output), whole)
