"""The jobs of a sweep, so many at a time, until each is done, has failed, or a signal stops them."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from lowrank.record import lock
from lowrank.report.board import Board
from lowrank.schema import Sweep
from lowrank.sweep import standing
from lowrank.sweep.course import FAILED, RUNNING, SKIPPED, WAITING, Course
from lowrank.sweep.fresh import OUTPUT, Ended, Fresh, Task, status
from lowrank.sweep.job import Job
from lowrank.sweep.journal import Journal
from lowrank.sweep.kin import Kin
from lowrank.sweep.lanes import Lane, Lanes
from lowrank.sweep.peaks import Peaks
from lowrank.sweep.served import WORKER, Served

POLL, REFRESH, AGAIN = 0.02, 0.5, 0.5  # seconds between looks at processes, at the board, at a folder that is owned


class Schedule:
    """``quiet``: jobs print to files of theirs, because they are several or the board has the terminal."""

    def __init__(
        self, jobs: Sequence[Job], lanes: Lanes, settings: Sweep, folder: Path, board: Board, *, quiet: bool
    ) -> None:
        self.jobs, self.lanes, self.settings, self.folder, self.board = jobs, lanes.each, settings, folder, board
        self.quiet, self.journal, self.kin = quiet, Journal(folder), Kin(jobs)
        self.courses = [Course() for _ in jobs]
        self.peaks = Peaks(jobs, lanes.each[0].variables) if lanes.weighed and len(jobs) > 1 else None
        self.command: Sequence[str] = WORKER
        self.stopped_by: signal.Signals | None = None

    def run(self) -> list[Course]:
        """How each job has ended; one that a signal kept from starting waits still."""
        drawn = 0.0
        try:
            for place in self.having(WAITING):
                self.skip_done(place)
            while self.busy or (self.having(WAITING) and not self.stopped_by):
                for lane in self.lanes:
                    self.settle(lane)
                for lane in self.lanes:
                    self.fill(lane)
                if time.monotonic() > drawn + REFRESH:
                    self.board.refresh()
                    drawn = time.monotonic()
                time.sleep(POLL)
        finally:
            if self.peaks is not None:
                self.peaks.close()
            self.board.close()
        return self.courses

    def stop(self, number: int, frame: object = None) -> None:
        """Passes a signal on: what runs saves and ends, and nothing else starts."""
        self.stopped_by = signal.Signals(number)
        for lane in self.lanes:
            if lane.running is not None and lane.busy:
                lane.running.signal(number)

    @property
    def busy(self) -> bool:
        return any(lane.busy for lane in self.lanes)

    def having(self, *found: str) -> list[int]:
        return [place for place, course in enumerate(self.courses) if course.status in found]

    # How a job begins.

    def fill(self, lane: Lane) -> None:
        """Starts in a lane that is free what comes next, if anything may start now."""
        if lane.busy or self.stopped_by:
            return
        held = lane.running.key if isinstance(lane.running, Served) else None
        for place in self.kin.near(self.having(WAITING), held):
            if (task := self.ready(place)) is None:
                continue
            tasks = [task, *self.companions(task)]
            beside = [*self.having(RUNNING), *(t.place for t in tasks[1:])]
            if self.peaks is None or not self.busy or self.peaks.fits(place, beside):
                self.start(lane, tasks)
                return

    def ready(self, place: int) -> Task | None:
        """What is to be done of a job; None where it is done, or cannot be begun now, or here."""
        course, job = self.courses[place], self.jobs[place]
        if time.monotonic() < course.look or course.status != WAITING:
            return None
        found = standing.standing(job, self.journal)
        match found.state:
            case standing.OWNED:
                if found.why != course.owner:
                    self.board.say(f"{job.folder}: waiting for {found.why}, which has it")
                course.owner, course.look = found.why, time.monotonic() + AGAIN
            case standing.OTHER:
                course.status, course.cause = FAILED, found.why
                self.board.ended(place, FAILED, found.why)
            case standing.DONE:
                self.skip_done(place)
            case state:
                return Task(place, job, resume=state != standing.NEW)
        return None

    def skip_done(self, place: int) -> None:
        if standing.standing(self.jobs[place], self.journal).state == standing.DONE:
            self.courses[place].status = SKIPPED
            self.board.ended(place, SKIPPED)

    def companions(self, first: Task) -> list[Task]:
        """Jobs that may train in one pass with ``first``: only such as begin, since one that goes on is at a step of
        its own."""
        if self.settings.together == 1 or first.resume or self.courses[first.place].alone:
            return []
        if why := self.kin.why_alone(first.place):
            self.board.say(f"{first.job.shown}: by itself, since {why}")
        found: list[Task] = []
        for place in self.kin.together(first.place, self.having(WAITING)):
            if len(found) < self.settings.together - 1 and not self.courses[place].alone:
                task = self.ready(place)
                found += [task] if task is not None and not task.resume else []
        return found

    def start(self, lane: Lane, tasks: Sequence[Task]) -> None:
        for task in tasks:
            course = self.courses[task.place]
            course.status, course.before = RUNNING, standing.summary(task.job.folder)
            if not task.resume and (why := self.journal.differs(task.job)):
                self.board.say(f"{task.job.shown}: {why}")
            self.journal.started(task.job, resume=task.resume)
            self.board.started(task.place)
        if self.settings.resident or len(tasks) > 1:
            self.worker(lane, self.kin.base(tasks[0].place)).feed(tasks)
        else:
            lane.leave()
            lane.running = Fresh(tasks[0], lane.variables, quiet=self.quiet)
        if self.stopped_by and lane.running is not None:  # a signal came since
            lane.running.signal(self.stopped_by)

    def worker(self, lane: Lane, key: str) -> Served:
        """The lane's, where that has the base; else a new one in its place."""
        if not (isinstance(lane.running, Served) and lane.running.alive and lane.running.key == key):
            lane.leave()
            output = self.folder / f"worker-{lane.number}.log" if self.quiet else None
            lane.running = Served(key, lane.variables, output, self.command)
        return lane.running

    # How it ends.

    def settle(self, lane: Lane) -> None:
        """What has ended in a lane."""
        if lane.running is None:
            return
        found = lane.running.ended()
        for ended in found:
            self.end(ended, several=len(found) > 1)
        if not lane.busy and not (self.settings.resident and lane.running.alive) and lane.running:
            lane.leave()

    def end(self, ended: Ended, *, several: bool) -> None:
        place, job = ended.task.place, ended.task.job
        course = self.courses[place]
        if ended.code != 0 and not self.stopped_by:
            if several and ended.died:
                course.status, course.alone = WAITING, True
                self.board.say(f"{job.shown}: {ended.cause}; goes on by itself")
                return
            if lock.living(job.folder):  # it found the folder taken, between our look and its start
                course.status = WAITING
                return
        course.end(ended, asked=self.stopped_by is not None)
        self.journal.ended(job, course.status, course.cause)
        if self.quiet and ended.code == 1 and (job.folder / OUTPUT).is_file():
            self.board.say(f"{job.shown}: what it printed is in {job.folder / OUTPUT}")
        self.board.ended(place, course.status, status(ended.code) if course.cause else "")
