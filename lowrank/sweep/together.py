"""K jobs of a sweep in one pass: each a run of its own in its own directory, the frozen base run once for all.

Each has its session, as ever: its adapters on its own tree over the one base, its optimizer, schedule, finite guard,
hooks and files. What is shared is the forward and backward of a step (``joint.Joint``, ``train.together``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from lowrank import run
from lowrank.data.pack import Batch
from lowrank.ledger.group import fullest, of_group
from lowrank.ledger.shortage import Shortage
from lowrank.record import lock
from lowrank.record.directory import Log
from lowrank.run import Assembly
from lowrank.schema import Config
from lowrank.session import resuming
from lowrank.session.session import Session
from lowrank.sweep.joint import Joint, why_not
from lowrank.train import together
from lowrank.train.stopping import Stopping

SEEN = 10_000  # steps whose batches are looked at beforehand, for the largest pass


@dataclass(frozen=True)
class Job:
    """What is to be trained, where, and the command that does the same."""

    config: Config
    folder: Path
    command: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a job ended: by its number, with None where it is done."""

    number: int
    error: BaseException | None = None


def train_together(jobs: Sequence[Job], made: Assembly, stopping: Stopping) -> Iterator[Ended]:
    """Trains the jobs in one pass, and those that cannot be in it after that, one by one; yields each as it ends.

    An error is its own job's: the others go on. A signal stops all, each saved. ``made`` loads, at each call, another
    tree of modules over one base.
    """
    group = Group([Member(number, job) for number, job in enumerate(jobs)], made, stopping)
    with stopping.installed():
        try:
            yield from group.started()
            yield from group.trained()
            yield from group.alone()
        finally:
            group.close()


@dataclass
class Member:
    """A job on its way, holding its directory's lock until it ends."""

    number: int
    job: Job
    log: Log = field(default_factory=Log)
    held: ExitStack = field(default_factory=ExitStack)
    session: Session | None = None

    def start(self, made: Assembly, stopping: Stopping, interpreter: int | None) -> int:
        """Everything up to the first file; without a session where the run is done already. ``interpreter``: bytes of
        the process before there was a job, once that is known; it is returned."""
        config, folder = self.job.config, self.job.folder
        self.held.enter_context(lock.owned(folder))
        resuming.refuse_second_run(config, folder)
        resuming.check_allowed(config, folder)
        parts, data = run.read(config, self.log, made)
        shortage = Shortage.of(parts, data, made.held(parts))
        shortage = replace(shortage, interpreter=interpreter or shortage.interpreter)
        with shortage.told():
            loaded = run.load(parts, self.log, made)
            session = Session(parts, data, loaded, folder, self.log, self.job.command, stopping, shortage)
            if session.finished:
                self.log.say(f"{folder}: this run is done; nothing to resume.")
            else:
                session.start()
                self.session = session
        return shortage.interpreter

    @property
    def trained(self) -> Session:
        assert self.session is not None
        return self.session

    def begin(self) -> None:
        """The directory's first files; from now on what stops the run is told there."""
        self.trained.begin(self.trained.before)
        self.held.enter_context(self.trained.recorded())
        self.trained.watching.catch_up(self.trained.saved)

    def ends(self, do: Callable[[], object]) -> Ended:
        """The job's last act: its directory is let go of, and nothing of it is held in memory."""
        try:
            with self.held:
                do()
        except BaseException as error:  # this job's alone, for the caller to tell
            return Ended(self.number, error)
        finally:
            self.session = None
        return Ended(self.number)


@dataclass
class Group:
    """The jobs that have not ended."""

    members: list[Member]
    made: Assembly
    stopping: Stopping
    interpreter: int | None = None  # bytes of the process before there was a job
    apart: list[Member] = field(default_factory=list)  # those that train alone

    def started(self) -> Iterator[Ended]:
        """Each made ready to train; ends those that cannot be, and those that are done."""
        for member in list(self.members):
            failed = attempt(partial(self.start, member))
            if failed is not None or member.session is None:
                self.members.remove(member)
                yield member.ends(partial(raised, failed))

    @property
    def sessions(self) -> list[Session]:
        return [one.trained for one in self.members]

    def start(self, member: Member) -> None:
        with self.stopping.at_once():
            self.interpreter = member.start(self.made, self.stopping, self.interpreter)

    def trained(self) -> Iterator[Ended]:
        """Those that can, in one pass."""
        self.part()
        with self.stopping.held():
            if len(self.members) > 1:
                joint = self.join()
                yield from self.begun(joint)
                yield from self.passes(joint)

    def part(self) -> None:
        """Parts those that can train in one pass from those that cannot, and says why."""
        for member in list(self.members):
            reason = why_not(member.trained, self.members[0].trained)
            if reason is None and len(self.members) == 1:
                reason = "there is no other that it could train with"
            if reason is not None:
                member.log.say(f"trains alone: {reason}")
                self.members.remove(member)
                self.apart.append(member)

    def join(self) -> Joint:
        """The common tree; each session is told that it is one of several."""
        first = self.members[0].trained
        models = {one.number: one.trained.model for one in self.members}
        joint = Joint(self.made.load(first.parts).model, models, first.parts, first.precision)
        coming = [[run.order.tokens(n + 1) for n in range(min(run.steps, SEEN))] for run in self.sessions]
        expected = of_group([run.predicted for run in self.sessions], fullest(coming))
        for one in self.members:
            one.trained.together, one.trained.predicted = len(self.members), expected
            one.log.say(f"together with {len(self.members) - 1} more, in one pass; {joint.told}")
        return joint

    def begun(self, joint: Joint) -> Iterator[Ended]:
        for member in list(self.members):
            failed = attempt(member.begin)
            if failed is not None:
                yield self.ended(member, joint, partial(raised, failed))

    def passes(self, joint: Joint) -> Iterator[Ended]:
        members = list(self.members)
        loops = [one.trained.loop for one in members]
        every = together.Every(loops)

        def forward(numbers: Sequence[int], batches: Sequence[Batch]) -> list[Tensor]:
            return joint([members[n].number for n in numbers], batches)

        with self.stopping.after_step(every):
            for left in together.run(loops, [one.trained.steps for one in members], forward, self.note):
                member = members[left.number]
                yield self.ended(member, joint, partial(last, left, member.trained))
                every.stop = self.stopping.asked  # a signal that broke an evaluation off is everybody's

    def ended(self, member: Member, joint: Joint, do: Callable[[], object]) -> Ended:
        self.members.remove(member)
        joint.leave(member.number)
        return member.ends(do)

    def note(self, line: str) -> None:
        for member in self.members:
            member.log.say(line)

    def alone(self) -> Iterator[Ended]:
        while self.apart:
            member = self.apart.pop(0)
            yield member.ends(partial(self.train, member))

    def train(self, member: Member) -> None:
        with self.stopping.at_once():
            member.trained.train()

    def close(self) -> None:
        """Where whoever asked for the jobs wants no more of them."""
        for member in (*self.members, *self.apart):
            member.ends(partial(raised, KeyboardInterrupt()))


def last(left: together.Left, session: Session) -> None:
    """What follows a run's last step."""
    raised(left.error)
    session.end()


def attempt(do: Callable[[], object]) -> BaseException | None:
    try:
        do()
    except BaseException as error:  # of one job, which ends with it
        return error
    return None


def raised(error: BaseException | None) -> None:
    if error is not None:
        raise error
