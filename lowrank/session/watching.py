"""All that watches and steers a run's loop, in the order in which it is called."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.adapters.inject import hooks
from lowrank.evaluate import Evaluation, Evaluator, PeriodicEvaluation
from lowrank.fast import heap, norm
from lowrank.record import directory
from lowrank.record.directory import Log
from lowrank.record.siblings import Siblings
from lowrank.schema import Checkpoint, Config
from lowrank.session import live
from lowrank.session.state import Moving
from lowrank.track import tracker
from lowrank.train import background
from lowrank.train.average import Average
from lowrank.train.checkpoint import Checkpoints, Saved
from lowrank.train.deadline import Deadline
from lowrank.train.digests import Digests
from lowrank.train.diverged import Diverged
from lowrank.train.early import EarlyStop
from lowrank.train.hooks import StepRecord
from lowrank.train.loop import Loop
from lowrank.train.metrics import MethodEvents, Metrics
from lowrank.train.profile import Named, Profile
from lowrank.train.progress import Progress
from lowrank.train.prune import Prune
from lowrank.train.shares import NORM
from lowrank.train.stopping import Stopping


class Watching:
    """The hooks of one run, of ``last`` steps, and what a checkpoint holds of them; ``identity`` goes into each."""

    def __init__(
        self,
        loop: Loop,
        config: Config,
        evaluator: Evaluator,
        folder: Path,
        *,
        last: int,
        identity: dict[str, Any],
        stopping: Stopping,
        log: Log,
        predicted_mb: float | None = None,
    ) -> None:
        self.loop, self.last, self.identity, self.stopping, self.log = loop, last, identity, stopping, log
        self.predicted_mb = predicted_mb
        self.metrics, self.methods = Metrics(folder / directory.METRICS), hooks(loop.model, last)
        self.average = Average(loop.parameters, config.loop.average) if config.loop.average is not None else None
        self.tracker = tracker(config.track, folder, config.to_dict())
        self.evaluation = PeriodicEvaluation(
            evaluator,
            loop.model,
            self.metrics,
            self.tracker,
            every=config.eval.every,
            last=last,
            evaluating=self.evaluating,
        )
        held_out, others = self.evaluation.loss_at, Siblings(folder, identity, config.eval.limit).best
        self.early = EarlyStop(held_out, config.loop.patience, loop)
        self.prune = Prune(held_out, others, config.loop.prune, loop)
        self.diverged = Diverged(config.loop.diverged, loop)
        self.digests = Digests(
            folder / directory.DIGESTS,
            loop.parameters,
            every=config.checkpoint.every,
            last=last,
            ended=lambda step: self.ended is not None and self.ended.stopped == step,
        )
        self.checkpoints = self.saving(folder / directory.CHECKPOINTS, config.checkpoint)
        self.progress: Progress | None = None
        self.deadline = Deadline(loop, config.loop.max_seconds)
        self.profile: Profile | None = None
        if config.loop.profile is not None:
            place, named = folder / directory.PROFILE, norms(loop.model)
            self.profile = Profile(loop, place, config.loop.profile, last=last, say=log.say, named=named)

    def saving(self, folder: Path, settings: Checkpoint) -> Checkpoints:
        return Checkpoints(
            folder,
            self.snapshot,
            every=settings.every,
            keep=settings.keep,
            last=self.last,
            trained=self.loop.parameters,
            beside=(self.metrics.path, self.digests.path),
            writer=background.Background() if settings.background else background.Foreground(),
        )

    def begin(self, saved: Saved | None, before: Evaluation | None) -> None:
        """From a checkpoint's state, or at step 1; ``before`` is the untouched base's evaluation."""
        if saved is not None:
            self.moving.put_back(saved)
            self.checkpoints.restore(saved.state)
        else:
            self.metrics.cut(None)
            self.digests.cut(None)
            self.digests.begin()
            if before is not None:
                self.metrics.write({"event": "eval", "step": 0, **before.metrics})
        first = self.loop.state.step
        self.progress = Progress(
            first,
            self.last,
            live.view(first, self.last, self.predicted_mb, lambda: self.stopping.asked),
            self.log.note,
            every=self.evaluation.every,
            held_out=self.evaluation.loss_at,
        )
        steering = [*self.methods, *([self.average] if self.average else [])]  # the average is of what methods leave
        judging = [MethodEvents(self.methods, self.metrics), self.evaluation, self.early, self.prune, self.diverged]
        tracking = [self.digests, *([self.tracker] if self.tracker else [])]
        watching = [*tracking, self.progress, self.checkpoints, self.deadline]
        profiling = [self.profile] if self.profile else []
        self.loop.hooks = [self.metrics, *steering, *judging, *watching, *profiling]

    @property
    def ended(self) -> EarlyStop | Prune | Diverged | None:
        """What ended the run, well, before its last step."""
        return next((one for one in (self.early, self.prune, self.diverged) if one.stopped is not None), None)

    def catch_up(self, saved: Saved | None) -> None:
        """What followed on the checkpoint's step when a signal broke its evaluation off: that, and the hooks after."""
        record = saved.state["pending"] if saved else None
        if record is not None:
            for hook in self.loop.hooks[self.loop.hooks.index(self.evaluation) :]:
                hook.after_step(StepRecord(**record))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the weights are those to be judged, and a signal is heeded at once."""
        told = self.progress.judging() if self.progress else nullcontext()
        with self.average.used() if self.average else nullcontext(), self.stopping.at_once(), told:
            yield
        heap.give_back()

    @property
    def moving(self) -> Moving:
        judging = {"early": self.early, "prune": self.prune, "diverged": self.diverged}
        states = {str(i): hook for i, hook in enumerate(self.methods)} | judging
        averaged = {"average": self.average} if self.average else {}
        return Moving(self.loop, states | averaged, {"metrics": self.metrics, "digests": self.digests})

    def snapshot(self) -> Saved:
        return self.moving.saved(
            held_out_loss=self.evaluation.loss_at(self.loop.state.step),
            pending=asdict(self.evaluation.pending) if self.evaluation.pending else None,
            identity=self.identity,
        )

    def close(self) -> None:
        if self.profile is not None:
            self.profile.close()
        failed = self.checkpoints.close()
        if failed is not None:  # in the background, while the run ended with an error of its own
            self.log.note("".join(traceback.format_exception(failed)))
        self.metrics.close()
        self.digests.close()
        if self.progress is not None:
            self.progress.close()
        if self.tracker is not None:
            self.tracker.close()


def norms(model: nn.Module) -> list[Named]:
    """What a profile counts as norms: the model's own modules of that name, and the fast path's."""
    own = {type(module) for module in model.modules() if type(module).__name__.endswith("Norm")}
    fast = [(cls, name) for cls in (norm.RMSNorm, norm.LayerNorm) for name in ("statistics", "normed", "gradient")]
    return [(cls, name, NORM) for cls, name in [*((cls, "forward") for cls in own), *fast]]
