"""What the launcher plug-in calls: a batch of jobs run, and what its sweeper is told of each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lowrank.errors import Interrupted, LowrankError
from lowrank.report.board import Board
from lowrank.schema import Sweep
from lowrank.sweep.course import INTERRUPTED, WAITING, Course
from lowrank.sweep.failures import failures
from lowrank.sweep.job import Job
from lowrank.sweep.lanes import Lanes, lanes
from lowrank.sweep.origin import Origin
from lowrank.sweep.schedule import Schedule
from lowrank.sweep.standing import number

__all__ = ["Job", "Origin", "lanes", "run", "schedule"]

End = tuple[float | None, str]  # what a sweeper is told, or why there is nothing to tell


def schedule(jobs: Sequence[Job], into: Lanes, settings: Sweep, folder: Path) -> Schedule:
    board = Board([(job.shown, job.folder) for job in jobs], sys.stdout)
    return Schedule(jobs, into, settings, folder, board, quiet=board.live or len(into.each) > 1)


def run(jobs: Schedule, settings: Sweep) -> dict[Path, End]:
    """Of each folder what its job has come to. Raises Interrupted where a signal stopped the sweep."""
    courses = jobs.run()
    if jobs.stopped_by:
        raise Interrupted(stopped(jobs, courses))
    ends = {}
    for job, course in zip(jobs.jobs, courses, strict=True):
        ends[job.folder] = _, cause = end(job, course, settings.metric)
        halfway = course.status == INTERRUPTED and not course.failed  # it has no figures yet, and no fault
        failures.note(job.folder, "" if halfway else cause)
    return ends


def end(job: Job, course: Course, metric: str | None) -> End:
    if course.failed:
        return None, course.cause
    if metric is None:
        return None, ""
    try:
        return number(job.folder, metric), ""
    except LowrankError as error:
        return None, str(error)


def stopped(jobs: Schedule, courses: Sequence[Course]) -> str:
    assert jobs.stopped_by is not None
    cut = [str(job.folder) for job, course in zip(jobs.jobs, courses, strict=True) if course.status == INTERRUPTED]
    left = sum(course.status == WAITING for course in courses)
    said = f"{jobs.stopped_by.name} in {', '.join(cut) or 'no job'}."
    return f"{said} {left} of {len(courses)} jobs did not start. The same command goes on."
