"""One training run, from its assembled parts to its finished directory."""

from __future__ import annotations

import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from lowrank import assemble, classes, directory, outcome, resuming
from lowrank.adapters import preflight
from lowrank.adapters.inject import adapter_state, apply, hooks, named_trainable
from lowrank.adapters.sites import adapted
from lowrank.assemble import Data, Loaded, Parts
from lowrank.directory import Log
from lowrank.disk import write_text
from lowrank.errors import Interrupted, NumericsError
from lowrank.evaluate import Evaluation, PeriodicEvaluation
from lowrank.identity import identity
from lowrank.keys import Clock
from lowrank.models.cache import cache
from lowrank.models.fingerprint import base_id, fingerprint
from lowrank.report import run as report
from lowrank.track import tracker
from lowrank.train import checkpoint, optim
from lowrank.train.hooks import join, split
from lowrank.train.loop import Loop, State
from lowrank.train.loss import target_logits, target_loss
from lowrank.train.metrics import MethodEvents, Metrics
from lowrank.train.precision import Precision
from lowrank.train.progress import ProgressLine
from lowrank.train.stopping import stopping_on_signals


class Session:
    """One run from its assembled parts to its finished directory."""

    def __init__(self, parts: Parts, data: Data, loaded: Loaded, folder: Path, log: Log, command: str | None) -> None:
        self.parts, self.loaded, self.folder, self.log, self.command = parts, loaded, folder, log, command
        self.data = data
        self.config, self.model = parts.config, loaded.model
        self.precision = Precision(parts.precision, parts.device)
        self.base = fingerprint(self.model)
        self.identity = identity(
            self.config,
            plan=parts.plan,
            data=data.split.sha256,
            base=base_id(self.base),
            precision=parts.precision,
            device=parts.device.type,
            fast=loaded.fast,
        )
        self.saved = resuming.saved(self.config.checkpoint, folder, self.identity, log)
        self.evaluator = assemble.evaluator(self.config, parts, data, loaded)
        self.order = assemble.batches(self.config, data, loaded.collate)
        self.steps, self.schedule = assemble.steps_and_schedule(self.config, self.order)

    @property
    def finished(self) -> bool:
        summary = directory.read_json(self.folder / directory.SUMMARY)
        return self.saved is not None and summary.get("status") == "done"

    def run(self) -> None:
        """Trains to the end; raises NumericsError or Interrupted, after saving, where it stops before."""
        before = self.evaluate_base() if self.config.eval.before else None
        clock = Clock(self.config.loop.seed)
        self.apply_checked(clock)
        self.loop = Loop(
            model=self.model,
            parameters=named_trainable(self.model),
            batches=self.order,
            loss=target_loss,
            optimizer=self.optimizer(),
            schedule=self.schedule,
            precision=self.precision,
            clock=clock,
            max_norm=self.config.loop.max_grad_norm,
            penalty=self.penalty,
            device=self.parts.device,
        )
        preflight.check_trainable(
            self.model, self.parts.plan, [p for g in self.loop.optimizer.param_groups for p in g["params"]]
        )
        self.begin(before)
        try:
            with stopping_on_signals(self.loop):
                self.loop.run(self.steps)
                if self.loop.state.step < self.steps:
                    raise self.interrupted(before)
                self.finish(before)
        except NumericsError as error:
            raise self.stopped_by(error, before) from error
        except Interrupted:
            raise
        except BaseException as error:
            self.log.note(traceback.format_exc())
            self.summarise("failed", before, None, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.close()

    def evaluate_base(self) -> Evaluation:
        self.log.say("evaluating the untouched model …")
        known = ("base", "data", "precision", "device", "fast", "threads")
        depends = {
            **{name: v for name, v in self.identity.items() if name in known or name.startswith("versions.")},
            "quant": asdict(self.config.quant),
            "settings": asdict(self.config.data),
            "eval": {**asdict(self.config.eval), "every": None, "before": None},
            "packed": self.loaded.collate.__name__,
        }
        return self.evaluator.cached(self.model, depends, cache())

    def apply_checked(self, clock: Clock) -> None:
        """Puts the adapters on, and checks on two documents that they are what the plan and their class promise."""
        probe = self.loaded.collate(self.data.train[:2]).to(self.parts.device)
        self.model.eval()
        with torch.no_grad(), self.precision.autocast():
            bare = target_logits(self.model, probe)
        state = self.saved.tensors["adapter"] if self.saved else None
        apply(self.model, self.parts.plan, self.config.loop.seed, clock, state=state, keep_base=False)
        self.model.eval()
        if state is None:
            with torch.no_grad(), self.precision.autocast():
                preflight.check_identity(self.model, bare, target_logits(self.model, probe))
        self.evaluator.check_room(self.model)  # an adapter may have taken positions
        preflight.check_subclasses(self.model)
        with self.precision.autocast():
            loss = target_loss(self.model, probe)
        loss.backward()
        preflight.check_gradients(self.model)
        self.model.zero_grad(set_to_none=True)

    def optimizer(self) -> torch.optim.Optimizer:
        settings = self.config.optim
        cls = classes.resolve(settings.target, torch.optim.Optimizer, "optim._target_")
        made = optim.groups(
            named_trainable(self.model), settings.groups, lr=settings.lr, weight_decay=settings.weight_decay
        )
        return cls(made, **settings.options)

    def penalty(self) -> torch.Tensor | float:
        return sum(module.adapter.penalty() for _, module in adapted(self.model))

    def begin(self, before: Evaluation | None) -> None:
        """The directory's first files, or a checkpoint's state put back; and everything that watches the loop."""
        self.log.open(self.folder)
        write_text(self.folder / directory.CONFIG, self.config.to_yaml())
        write_text(self.folder / directory.PLAN, f"{self.parts.plan}\n")
        directory.write_json(self.folder / directory.PLAN_JSON, self.parts.plan.to_dict())
        metrics = Metrics(self.folder / directory.METRICS)
        self.tracker = tracker(self.config.track, self.folder, self.config.to_dict())
        self.evaluation = PeriodicEvaluation(
            self.evaluator, self.model, metrics, self.tracker, self.config.eval.every, self.steps
        )
        self.metrics, self.methods = metrics, hooks(self.model, self.steps)
        self.checkpoints = checkpoint.Checkpoints(
            self.folder / directory.CHECKPOINTS,
            self.snapshot,
            every=self.config.checkpoint.every,
            keep=self.config.checkpoint.keep,
            last=self.steps,
        )
        if self.saved is not None:
            self.restore(self.saved)
        else:
            metrics.cut(0)
            if before is not None:
                metrics.write({"event": "eval", "step": 0, **before.metrics})
        self.progress = ProgressLine(self.loop.state.step, self.steps)
        watching = [*([self.tracker] if self.tracker else []), self.progress]
        events = MethodEvents(self.methods, metrics)
        self.loop.hooks = [metrics, *self.methods, events, self.evaluation, *watching, self.checkpoints]

    def snapshot(self) -> checkpoint.Saved:
        tensors, values = optim.state_tensors(self.loop.optimizer)
        hook_tensors, hook_values = split(hook.state_dict() for hook in self.methods)
        state = {
            "loop": asdict(self.loop.state),
            "optimizer": values,
            "scaler": self.precision.state_dict(),
            "hooks": hook_values,
            "metrics_bytes": self.metrics.position(),
            "held_out_loss": self.evaluation.loss_at(self.loop.state.step),
            "identity": self.identity,
        }
        files = {"adapter": adapter_state(self.model), "optimizer": tensors, "hooks": hook_tensors}
        return checkpoint.Saved({name: held for name, held in files.items() if held}, state)

    def restore(self, saved: checkpoint.Saved) -> None:
        optim.load_state(self.loop.optimizer, saved.tensors.get("optimizer", {}), saved.state["optimizer"])
        self.loop.state = State(**saved.state["loop"])
        self.precision.load_state_dict(saved.state["scaler"])
        for hook, state in zip(self.methods, join(saved.tensors.get("hooks", {}), saved.state["hooks"]), strict=True):
            hook.load_state_dict(state)
        self.metrics.cut(saved.state["metrics_bytes"])

    def stopped_by(self, error: NumericsError, before: Evaluation | None) -> NumericsError:
        """The finite guard's stop: the parameters are still those of the step before, and are saved."""
        message = f"{error}; nothing was saved (checkpoint.every=0)."
        if self.config.checkpoint.every:
            path = self.checkpoints.save(self.loop.state.step)
            message = f"{error}, saved in {path.relative_to(self.folder)}."
        self.log.note(message)
        self.summarise("failed", before, None, error=message)
        return NumericsError(message)

    def interrupted(self, before: Evaluation | None) -> Interrupted:
        """A signal's stop, after a whole step."""
        step, advice = self.loop.state.step, "checkpoint.every=0: nothing was saved."
        if self.config.checkpoint.every:
            self.checkpoints.save(step)
            advice = "checkpoint.resume=true continues it."
        self.summarise("interrupted", before, None)
        return Interrupted(f"interrupted after step {step} of {self.steps}; {advice}")

    def finish(self, before: Evaluation | None) -> None:
        self.log.say("evaluating the tuned model …")
        generated = self.evaluator.generated(self.model)
        held_out = self.evaluation.latest(self.loop.state.step)
        after = Evaluation({**held_out, **generated.metrics}, generated.texts)
        rows = self.evaluator.samples(before, after)
        lines = "".join(directory.json_line(row) for row in rows)
        write_text(self.folder / directory.SAMPLES, lines)
        outcome.save_adapter(self.model, self.folder / directory.ADAPTER, self.base, self.config.model.name, self.log)
        outcome.write_spectra(self.model, self.folder / directory.SPECTRA, self.log)
        self.summarise("done", before, after)
        self.model.eval()

    def summarise(self, status: str, before: Evaluation | None, after: Evaluation | None, error: str = "") -> None:
        """summary.json and report.html."""
        gain = self.evaluator.gain(before, after) if after else None
        result = {**after.metrics, **({"rougeL_gain": gain} if gain is not None else {})} if after else None
        summary = {
            "status": status,
            **outcome.course(self.loop.state, self.parts),
            "eval": {"before": before.metrics if before else None, "after": result},
            **outcome.conditions(self.parts, self.loaded, self.data, self.base),
            **({"command": self.command} if self.command else {}),
            **({"error": error} if error else {}),
        }
        directory.write_json(self.folder / directory.SUMMARY, summary)
        report.write(self.folder)

    def close(self) -> None:
        self.progress.close()
        self.metrics.close()
        if self.tracker is not None:
            self.tracker.close()
