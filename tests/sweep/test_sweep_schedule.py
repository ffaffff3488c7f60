"""The jobs of a sweep: how many at a time, which of them at all, and what becomes of those that end badly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import jobs, ran, starts, sweep

from lowrank.record import lock
from lowrank.sweep.course import DONE as DONE_NOW
from lowrank.sweep.course import FAILED, INTERRUPTED, SKIPPED, WAITING

LAUNCHER = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from jobs import jobs, ran
ran(jobs(Path({folder!r}), *{doing!r}), 2)
"""


def status(folder: Path) -> list[str]:
    found = [json.loads(path.read_text())["status"] for path in sorted(folder.glob("sweep/*/summary.json"))]
    return found


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_so_many_run_at_a_time_and_never_more(n_jobs: int, tmp_path: Path) -> None:
    made = jobs(tmp_path, *["sleep=0.3"] * 6)
    schedule, _ = sweep(made, n_jobs)
    seen: list[int] = []
    watching = threading.Thread(target=schedule.run)
    watching.start()
    while watching.is_alive():
        seen.append(len(schedule.having("running")))
        time.sleep(0.01)
    assert max(seen) == n_jobs
    assert status(tmp_path) == ["done"] * 6


def test_a_job_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    made = jobs(tmp_path, "done", "exit=4", "kill", "done")
    courses, said = ran(made)
    assert [course.status for course in courses] == [DONE_NOW, FAILED, FAILED, DONE_NOW]
    assert [course.cause for course in courses] == ["", "it had to end with 4", "killed by SIGKILL", ""]
    assert "[2/4] failed (exit 4)\n" in said
    summary = json.loads((made[1].folder / "summary.json").read_text())
    assert summary == {"status": "failed", "error": "it had to end with 4", "command": "python train.py exit=4"}
    assert json.loads((made[2].folder / "summary.json").read_text())["error"] == "killed by SIGKILL"


def test_the_same_sweep_again_starts_only_what_is_not_done(tmp_path: Path) -> None:
    doing = ("done", "exit=4", "kill", "done")
    ran(jobs(tmp_path, *doing))
    courses, said = ran(jobs(tmp_path, *doing))
    assert [course.status for course in courses] == [SKIPPED, FAILED, DONE_NOW, SKIPPED]
    assert Counter(job for job, _ in starts(tmp_path)) == {"0": 1, "1": 2, "2": 2, "3": 1}
    assert said.index("[4/4] skipped") < said.index("[2/4]")


def test_a_job_that_goes_on_is_told_to_and_one_that_begins_is_not(tmp_path: Path) -> None:
    (made,) = jobs(tmp_path, "kill")
    assert "++checkpoint.resume=true" not in made.process(resume=False)
    assert made.process(resume=True)[-2:] == ["++checkpoint.resume=true", str(made.folder)]
    assert (made.tree(resume=False)["checkpoint"], made.tree(resume=True)["checkpoint"]) == (
        {"resume": False},
        {"resume": True},
    )
    ran([made])
    ran([made])
    lines = [json.loads(line) for line in (tmp_path / "sweep/jobs.jsonl").read_text().splitlines()]
    assert [line["resume"] for line in lines if line["event"] == "start"] == [False, True]


def test_code_that_was_edited_runs_again_in_a_folder_of_its_own_and_is_said_to(tmp_path: Path) -> None:
    (old,) = jobs(tmp_path, "done")
    ran([old])
    (new,) = jobs(tmp_path, "done", code="edited")
    _, said = ran([new])
    assert f"n=0: code differs from {old.folder.name}: runs again\n" in said
    assert status(tmp_path) == ["done", "done"]


def test_a_folder_that_is_named_without_its_hash_keeps_the_run_that_it_holds(tmp_path: Path) -> None:
    (old,) = jobs(tmp_path, "done")
    (new,) = jobs(tmp_path, "done", code="edited")
    old, new = (replace(one, folder=tmp_path / "sweep/0", own=(str(tmp_path / "sweep/0"),)) for one in (old, new))
    ran([old])
    assert ran([old])[0][0].status == SKIPPED
    (course,), _ = ran([new])
    assert course.cause == "holds a run already (another one by its code). Give another hydra.sweep.dir."
    assert status(tmp_path) == ["done"]


def test_a_folder_that_a_living_process_has_is_waited_for(tmp_path: Path) -> None:
    made = jobs(tmp_path, "done", "done")
    schedule, said = sweep(made)
    running = threading.Thread(target=schedule.run)
    with lock.owned(made[0].folder):
        running.start()
        for _ in range(500):
            if schedule.courses[1].status == DONE_NOW:
                break
            time.sleep(0.01)
        assert [course.status for course in schedule.courses] == [WAITING, DONE_NOW]
    running.join(timeout=20)
    assert [course.status for course in schedule.courses] == [DONE_NOW, DONE_NOW]
    assert said.getvalue().count("waiting for process") == 1


def test_a_signal_is_passed_on_and_nothing_else_starts(tmp_path: Path) -> None:
    made = jobs(tmp_path, "sleep=60", "sleep=60", "done")
    schedule, _ = sweep(made, 2)
    running = threading.Thread(target=schedule.run)
    running.start()
    for _ in range(500):
        if (tmp_path / "sweep/log").is_file() and len(starts(tmp_path)) == 2:
            break
        time.sleep(0.01)
    time.sleep(0.1)  # until their handlers are there
    schedule.stop(signal.SIGTERM)
    running.join(timeout=20)
    assert [course.status for course in schedule.courses] == [INTERRUPTED, INTERRUPTED, WAITING]
    assert status(tmp_path) == ["interrupted", "interrupted"]


def test_a_launcher_that_is_killed_takes_its_jobs_along_and_the_next_completes_what_is_missing(tmp_path: Path) -> None:
    doing = ("done", "exit=4", "kill", "done", "sleep=1.5", "sleep=1.5", "exit=4", "done")
    path = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    command = [sys.executable, "-c", LAUNCHER.format(path=path, folder=str(tmp_path), doing=doing)]
    process = subprocess.Popen(command)
    for _ in range(1000):
        if (tmp_path / "sweep/log").is_file() and {"4", "5"} <= {job for job, _ in starts(tmp_path)}:
            break
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)  # until their handlers are there
    done = {path.parent.name for path in tmp_path.glob("sweep/*/summary.json") if "done" in path.read_text()}
    process.kill()
    process.wait()
    for _ in range(1000):
        if status(tmp_path).count("interrupted") == 2:  # they had its signal, and saved
            break
        time.sleep(0.01)
    before = Counter(job for job, _ in starts(tmp_path))
    courses, _ = ran(jobs(tmp_path, *doing), 2)
    after = Counter(job for job, _ in starts(tmp_path))
    assert [course.status for course in courses].count(FAILED) == 2
    assert status(tmp_path).count("done") == 6
    assert done
    assert all(after[name.partition("-")[0]] == before[name.partition("-")[0]] for name in done)
    assert max((after - before).values()) == 1
