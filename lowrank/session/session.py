"""One training run, from its assembled parts to its finished directory."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import torch

from lowrank import assemble
from lowrank.adapters import preflight
from lowrank.adapters.base import Adapter
from lowrank.adapters.inject import named_trainable
from lowrank.adapters.sites import adapted, called
from lowrank.assemble import Data, Loaded, Parts
from lowrank.config import to_yaml
from lowrank.disk import write_text
from lowrank.errors import Interrupted, NumericsError
from lowrank.evaluate import Evaluation
from lowrank.fast import heap
from lowrank.keys import Clock
from lowrank.ledger.ledger import Ledger
from lowrank.ledger.record import Record
from lowrank.ledger.remembered import foretold
from lowrank.ledger.shortage import Shortage
from lowrank.models.cache import cache
from lowrank.models.fingerprint import base_id, fingerprint
from lowrank.record import directory, source
from lowrank.record.directory import Log
from lowrank.report import run as report
from lowrank.session import card, outcome, provenance, resuming
from lowrank.session.attach import attach
from lowrank.session.identity import MEASURED, identity, within
from lowrank.session.watching import Watching
from lowrank.train import checkpoint
from lowrank.train.finite import NotFinite
from lowrank.train.loop import Loop
from lowrank.train.precision import Precision
from lowrank.train.stopping import Stopping


class Session:
    """One run from its assembled parts to its finished directory."""

    def __init__(
        self,
        parts: Parts,
        data: Data,
        loaded: Loaded,
        folder: Path,
        log: Log,
        command: str | None,
        stopping: Stopping,
        shortage: Shortage | None = None,
    ) -> None:
        self.parts, self.loaded, self.folder, self.log, self.command = parts, loaded, folder, log, command
        self.stopping, self.shortage = stopping, shortage
        self.ledger = Record(folder, parts.device)
        self.data = data
        self.config, self.model = parts.config, loaded.model
        self.precision = Precision(parts.precision, parts.device)
        self.base = loaded.hashes or fingerprint(self.model)
        self.order = assemble.batches(self.config, data, loaded.collate)
        self.steps, self.schedule = assemble.steps_and_schedule(self.config, self.order)
        self.identity = identity(parts, data, loaded, base=base_id(self.base), steps=self.steps)
        self.saved = resuming.saved(parts, folder, self.identity, log)
        self.evaluator = assemble.evaluator(self.config, parts, data, loaded)
        self.before: Evaluation | None = None  # the untouched base's
        self.together = 1  # runs whose steps are made in one pass

    @property
    def finished(self) -> bool:
        return resuming.finished(self.folder, self.saved, self.identity, self.config)

    def run(self) -> None:
        """Trains to the end, or until ``loop.max_seconds`` have passed; raises NumericsError or Interrupted, after
        saving, where it stops before. A signal that comes before the first step raises KeyboardInterrupt."""
        self.start()
        self.train()

    def train(self) -> None:
        """From the first file to the last."""
        with self.stopping.held():
            self.begin(self.before)
            with self.recorded():
                with self.stopping.after_step(self.loop):
                    self.watching.catch_up(self.saved)
                    self.loop.run(self.steps)
                self.end()

    def start(self) -> None:
        """All that comes before the directory's first file: the untouched base judged, the adapters on it, the loop."""
        with self.stopping.at_once():
            self.before = self.evaluate_base() if self.config.eval.before else None
        self.prepare()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """From ``begin`` to the end: what stops the run before that is told in its directory, and raised as what a user
        reads of it."""
        try:
            yield
        except NumericsError as error:
            raise self.stopped_by(error, self.before) from error
        except KeyboardInterrupt as error:
            raise Interrupted(self.left(self.before)) from error
        except BaseException as error:
            self.log.note(traceback.format_exc())
            known = self.shortage.explained(error) if self.shortage else None
            self.summarise("failed", self.before, None, error=str(known or f"{type(error).__name__}: {error}"))
            if known is None:
                raise
            raise known from error
        finally:
            self.watching.close()

    def first_steps(self, count: int) -> None:
        """Trains so many steps of the whole run's schedule, and leaves what they write: nothing is evaluated. Raises
        KeyboardInterrupt at a signal."""
        self.prepare()
        self.begin(None)
        try:
            self.loop.run(min(count, self.steps))
        finally:
            self.watching.close()

    def prepare(self) -> None:
        """The adapters on the model, checked, and the loop."""
        clock = Clock(self.config.loop.seed)
        state = self.saved.tensors["adapter"] if self.saved else None
        self.fast = attach(self.parts, self.data, self.loaded, self.evaluator, self.precision, clock, state)
        self.loop = self.make_loop(clock)
        self.fast = f"{self.fast}; {self.loop.update}"
        self.log.say(self.fast)
        preflight.check_trainable(
            self.model, self.parts.plan, [p for g in self.loop.optimizer.param_groups for p in g["params"]]
        )

    def end(self) -> None:
        """What follows the last step. Raises KeyboardInterrupt where a signal made it the last."""
        self.loop.update.release()
        if self.loop.state.step < self.steps and self.stopping.asked:
            raise KeyboardInterrupt
        if self.watching.ended is not None:
            self.log.say(f"{self.watching.ended}")
            if self.config.checkpoint.every:
                self.watching.checkpoints.save(self.loop.state.step)
            self.finish(self.before)
        elif self.loop.state.step < self.steps and self.watching.deadline.passed:
            self.log.say(f"loop.max_seconds={self.config.loop.max_seconds:g}: {self.left(self.before)}")
        else:
            self.finish(self.before)
        self.model.eval()

    def make_loop(self, clock: Clock) -> Loop:
        settings = self.config.loop
        return Loop(
            model=self.model,
            parameters=named_trainable(self.model),
            batches=self.order,
            loss=self.ledger.watching(assemble.loss(self.config)),
            optimizer=assemble.optimizer(self.config.optim, self.model, fast=settings.fast),
            schedule=self.schedule,
            precision=self.precision,
            clock=clock,
            max_norm=settings.max_grad_norm,
            penalty=self.penalty,
            device=self.parts.device,
            max_skipped=settings.max_skipped if settings.on_nonfinite == "skip" else 0,
            trace=settings.trace_nonfinite,
            named=called,
            updating=partial(assemble.updating, self.config, say=self.log.note),
        )

    def evaluate_base(self) -> Evaluation:
        self.log.say("evaluating the untouched model …")
        depends = {
            **{name: v for name, v in self.identity.items() if within(name, MEASURED)},
            "quant": asdict(self.config.quant),
            "settings": asdict(self.config.data),
            "eval": {**asdict(self.config.eval), "every": None, "before": None},
            "packed": self.loaded.packed,
        }
        return self.evaluator.cached(self.model, depends, cache())

    def penalty(self) -> torch.Tensor | float:
        return sum(adapter.penalty() for adapter in self.penalised)

    @cached_property
    def penalised(self) -> list[Adapter]:
        """The adapters that have a penalty: finding them takes longer than a small model's step may."""
        return [site.adapter for _, site in adapted(self.model) if type(site.adapter).penalty is not Adapter.penalty]

    @cached_property
    def predicted(self) -> Ledger | None:
        known = self.shortage
        return foretold(known.parts, known.data, known.interpreter, self.log) if known else None

    def begin(self, before: Evaluation | None) -> None:
        """The directory's first files, or a checkpoint's state put back."""
        self.log.open(self.folder)
        write_text(self.folder / directory.CONFIG, to_yaml(provenance.of_run(self.config)))
        provenance.write(self.folder, self.identity, self.parts, self.command, self.saved)
        write_text(self.folder / directory.PLAN, f"{self.parts.plan}\n")
        directory.write_json(self.folder / directory.PLAN_JSON, self.parts.plan.to_dict())
        told = card.card(self.data, self.order.indices(1)[0], self.parts.tokenizer)
        write_text(self.folder / directory.DATA, directory.json_line(told))
        self.ledger.begin(self.predicted, self.loop, self.together)
        self.watching = Watching(
            self.loop,
            self.config,
            self.evaluator,
            self.folder,
            last=self.steps,
            identity=self.identity,
            stopping=self.stopping,
            log=self.log,
            predicted_mb=self.ledger.peak_mb,
        )
        try:
            self.watching.begin(self.saved, before)
        except BaseException:
            self.watching.close()  # its files: a disk that is full, or a file that is not the run's, stops it here
            raise
        self.loop.hooks = [*self.loop.hooks, self.ledger]
        heap.give_back()  # what loading and the pre-flight have left in pieces too small for a step's tensors

    def stopped_by(self, error: NumericsError, before: Evaluation | None) -> NumericsError:
        """The finite guard's stop: the parameters are those of the step before and are saved, if they are finite."""
        sound = isinstance(error, NotFinite) and not error.fault.trained
        if not sound:
            good, _ = checkpoint.newest(self.folder / directory.CHECKPOINTS)
            kept = f"the newest checkpoint is {good.relative_to(self.folder)}" if good else "there is no checkpoint"
            message = f"{error}, and nothing was saved; {kept}."
        elif self.config.checkpoint.every:
            path = self.watching.checkpoints.save(self.loop.state.step)
            message = f"{error}, saved in {path.relative_to(self.folder)}."
        else:
            message = f"{error}; nothing was saved (checkpoint.every=0)."
        self.log.note(message)
        self.summarise("failed", before, None, error=message)
        return NumericsError(message)

    def left(self, before: Evaluation | None) -> str:
        """A stop after a whole step: saves, and says how to go on."""
        step, advice = self.loop.state.step, "checkpoint.every=0: nothing was saved."
        if self.config.checkpoint.every:
            self.watching.checkpoints.save(step)
            advice = "checkpoint.resume=true continues it."
        self.summarise("interrupted", before, None)
        return f"interrupted after step {step} of {self.steps}; {advice}"

    def finish(self, before: Evaluation | None) -> None:
        self.log.say("evaluating the tuned model …")
        with self.watching.evaluating():
            generated = self.evaluator.generated(self.model)
            held_out = self.watching.evaluation.latest(self.loop.state.step)
        if self.watching.average is not None:
            self.watching.average.take()  # training is over: what follows is saved
        self.watching.checkpoints.wait()
        after = Evaluation({**held_out, **generated.metrics}, generated.texts)
        rows = self.evaluator.samples(before, after)
        lines = "".join(directory.json_line(row) for row in rows)
        write_text(self.folder / directory.SAMPLES, lines)
        final, step = self.folder / directory.ADAPTER, self.loop.state.step
        outcome.save_adapter(self.model, final, self.base, self.config.model.name, self.log, step=step)
        outcome.write_spectra(self.model, self.folder / directory.SPECTRA, self.log)
        self.summarise("done", before, after)

    def summarise(self, status: str, before: Evaluation | None, after: Evaluation | None, error: str = "") -> None:
        """summary.json and report.html."""
        gain = self.evaluator.gain(before, after) if after else None
        result = {**after.metrics, **({"rougeL_gain": gain} if gain is not None else {})} if after else None
        summary = {
            "status": status,
            **outcome.course(self.loop.state, self.parts),
            "together": self.together,
            "predicted_peak_memory_mb": self.ledger.peak_mb,
            "eval": {"before": before.metrics if before else None, "after": result},
            **outcome.conditions(self.parts, self.loaded, self.data, self.base, self.fast),
            "hashes": outcome.hashes(self.loop),
            "git": source.checkout().to_dict(),
            "stopped_early": self.watching.early.stopped,
            "pruned": self.watching.prune.found,
            "diverged": self.watching.diverged.stopped,
            "lr_range": outcome.lr_range(self.config, self.folder),
            **({"command": self.command} if self.command else {}),
            **({"error": error} if error else {}),
        }
        directory.write_json(self.folder / directory.SUMMARY, summary)
        self.ledger.finish(summary["peak_memory_mb"])
        report.write(self.folder)
