"""Jobs in workers: which jobs one worker gets, and what becomes of them when it dies."""

from __future__ import annotations

from pathlib import Path

from jobs import jobs, ran, starts

from lowrank.schema import Sweep

RESIDENT = Sweep(resident=True)


def test_jobs_of_one_base_have_one_worker_after_another_none_of_another_base(tmp_path: Path) -> None:
    made = jobs(tmp_path, "done", "done", "done")
    others = [*jobs(tmp_path, "done", "done", "done", "done", base="other")[3:]]
    order = [made[0], *others, made[1], made[2]]
    courses, _ = ran(order, settings=RESIDENT)
    assert [course.status for course in courses] == ["done"] * 4
    processes = dict(starts(tmp_path))
    assert processes["0"] == processes["1"] == processes["2"] != processes["3"]


def test_a_job_that_fails_in_a_worker_is_told_and_the_worker_goes_on(tmp_path: Path) -> None:
    courses, _ = ran(jobs(tmp_path, "done", "exit=4", "done"), settings=RESIDENT)
    assert [course.status for course in courses] == ["done", "failed", "done"]
    assert courses[1].cause == "it had to end with 4"
    assert len({process for _, process in starts(tmp_path)}) == 1


def test_a_worker_that_dies_fails_its_job_and_the_rest_have_another(tmp_path: Path) -> None:
    made = jobs(tmp_path, "done", "kill", "done")
    courses, _ = ran(made, settings=RESIDENT)
    assert [course.status for course in courses] == ["done", "failed", "done"]
    assert courses[1].cause == "its worker: killed by SIGKILL"
    assert len({process for _, process in starts(tmp_path)}) == 2
    courses, _ = ran(made, settings=RESIDENT)
    assert [course.status for course in courses] == ["skipped", "done", "skipped"]


def test_jobs_that_may_train_in_one_pass_are_asked_for_together(tmp_path: Path) -> None:
    made = jobs(tmp_path, *["done"] * 5)
    courses, _ = ran(made, settings=Sweep(together=3))
    assert [course.status for course in courses] == ["done"] * 5
    processes = [process for _, process in sorted(starts(tmp_path))]
    assert [processes.count(process) for process in dict.fromkeys(processes)] == [3, 2]


def test_of_those_a_worker_dies_with_each_goes_on_by_itself(tmp_path: Path) -> None:
    courses, said = ran(jobs(tmp_path, "done", "kill", "done"), settings=Sweep(together=3))
    assert [course.status for course in courses] == ["done", "done", "done"]
    assert said.count("goes on by itself") == 2
    assert len({process for _, process in starts(tmp_path)}) == 3


def test_a_job_that_cannot_train_with_others_runs_by_itself_and_is_said_to(tmp_path: Path) -> None:
    made = jobs(tmp_path, *["done"] * 3)
    made[1].config["adapter"]["init"] = "pissa"
    courses, said = ran(made, settings=Sweep(together=3))
    assert [course.status for course in courses] == ["done"] * 3
    assert said.count("by itself, since") == 1
    assert "n=1: by itself, since init=pissa changes the base\n" in said
    processes = dict(starts(tmp_path))
    assert processes["0"] == processes["2"] != processes["1"]
