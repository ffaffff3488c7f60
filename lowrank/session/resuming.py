"""Which checkpoint a run goes on from, and whether it may: all that is refused is refused before a file changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank import assemble, manifest
from lowrank.adapters.base import Adapter
from lowrank.adapters.inject import adapter_state, apply
from lowrank.adapters.plan import InjectionPlan, resolve
from lowrank.assemble import Parts
from lowrank.errors import ConfigError, LowrankError, RefusedError, did_you_mean
from lowrank.record import directory
from lowrank.record.directory import Log
from lowrank.schema import Config
from lowrank.session.identity import LENGTH, STEPS, differences, names, recorded, within
from lowrank.train import checkpoint
from lowrank.train.metrics import refuse_changed
from lowrank.train.schedule import schedule


def refuse_second_run(config: Config, folder: Path) -> None:
    """Raises RefusedError where the directory holds a run, or the remains of one, and is not to be resumed."""
    there = next((name for name in directory.RUN if (folder / name).exists()), None)
    if there is not None and not config.checkpoint.resume:
        advice = "To continue it: checkpoint.resume=true; else name another."
        raise RefusedError(f"{folder}: holds a run already ({there}). {advice}")


def check_allowed(config: Config, folder: Path) -> None:
    """Raises ConfigError for a name in ``checkpoint.allow`` that is no field of an identity and no group of them."""
    known = names(config, recorded(folder)[0])
    for name in config.checkpoint.allow:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"checkpoint.allow: '{name}' is nothing that a run's numbers depend on.{hint}")


def saved(parts: Parts, folder: Path, identity: dict[str, Any], log: Log) -> checkpoint.Saved | None:
    """The newest checkpoint that verifies; None where the run starts at step 1, or is done and left none.

    Raises RefusedError where none verifies, where what the run's numbers depend on has changed and is not allowed to,
    or where what is allowed cannot be: it then stands in the run's log too, and nothing else has changed.
    """
    if not parts.config.checkpoint.resume:
        return None
    try:
        return found(parts, folder, identity, log)
    except LowrankError as error:
        log.open(folder)
        log.note(str(error))
        raise


def found(parts: Parts, folder: Path, identity: dict[str, Any], log: Log) -> checkpoint.Saved | None:
    manifest.give_back(folder / directory.CHECKPOINTS)
    path, wrong = checkpoint.newest(folder / directory.CHECKPOINTS)
    for fault in wrong:
        log.say(f"{fault}; using {path.name if path else 'none'}.")
    if path is None:
        if wrong:
            raise RefusedError(f"{folder}: no checkpoint verifies, so there is nothing to resume from.")
        if directory.read_json(folder / directory.SUMMARY).get("status") == "done":
            refuse_to_repeat(folder, identity, parts.config.checkpoint.allow)
        else:
            log.say("nothing to resume from; starting at step 1")
        return None
    one = checkpoint.read(path)
    old, done = one.state["identity"], one.state["loop"]["step"]
    changed = drift(old, identity)
    refuse_drift(changed, parts.config.checkpoint.allow)
    if identity[STEPS] < done:
        least = f"Give at least {done}, or begin anew in another directory."
        raise RefusedError(f"resume refused: loop.steps {identity[STEPS]} is below the {done} steps done. {least}")
    if "plan" in changed:
        refuse_misfit(parts, one.tensors["adapter"])
    refuse_changed(folder / directory.METRICS, one.state["metrics"])
    refuse_changed(folder / directory.DIGESTS, one.state["digests"])
    if not finished(folder, one, identity, parts.config):
        log.say(f"resuming after step {done} from {path}")
        for line in consequences(parts, changed, done, old, identity[STEPS]):
            log.say(line)
    return one


def finished(folder: Path, one: checkpoint.Saved | None, identity: dict[str, Any], config: Config) -> bool:
    """Whether a run that is resumed is at its end: done, not made longer since, given more patience, nor freed of what
    had ended it."""
    summary = directory.read_json(folder / directory.SUMMARY)
    if not config.checkpoint.resume or summary.get("status") != "done":
        return False
    if one is None:
        return True  # without a checkpoint: what differed was refused
    early = one.state["hooks"].get("early", {})
    patient = early.get("stopped") is not None and (
        config.loop.patience is None or early["since"] < config.loop.patience
    )
    longer = identity[STEPS] > one.state["identity"][STEPS]
    freed = [name for name in ("prune", "diverged") if getattr(config.loop, name) is None and told(one, name)]
    return summary.get("steps") == one.state["loop"]["step"] and not patient and not longer and not freed


def told(one: checkpoint.Saved, name: str) -> bool:
    """Whether a checkpoint's hook of that name had ended the run."""
    state = one.state["hooks"].get(name, {})
    return state.get("found", state.get("stopped")) is not None


def refuse_to_repeat(folder: Path, identity: dict[str, Any], allowed: list[str]) -> None:
    """Of a run that is done and has no checkpoint: as it was, it stays as it is; anything else would train it anew."""
    old, _ = recorded(folder)
    refuse_drift(drift(old, identity), allowed)
    if old.get(STEPS) != identity[STEPS]:
        raise RefusedError(f"{folder}: this run is done, and left no checkpoint from which to go on. Name another.")


def drift(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """What differs, but for a run's length where that has grown or stayed."""
    changed = differences(old, new)
    free = (STEPS,) if new[STEPS] < old.get(STEPS, 0) else LENGTH
    return {name: how for name, how in changed.items() if name not in free}


def refuse_drift(changed: dict[str, str], allowed: list[str]) -> None:
    refused = {name: how for name, how in changed.items() if not within(name, allowed)}
    if refused:
        what = "; ".join(f"{name} {how}" for name, how in refused.items())
        raise RefusedError(f"resume refused: {what}. To accept: 'checkpoint.allow=[{','.join(refused)}]'.")


def refuse_misfit(parts: Parts, tensors: dict[str, Tensor]) -> None:
    """Raises RefusedError, naming the first tensor of the checkpoint that this plan has no place for, or lacks."""
    wanted = adapter_state(apply(assemble.skeleton(parts.config), parts.plan))
    for name in sorted({*wanted, *tensors}):
        shapes = [str(tuple(held[name].shape)) if name in held else "not there" for held in (tensors, wanted)]
        if shapes[0] != shapes[1]:
            what = f"{name} is {shapes[0]} in the checkpoint and {shapes[1]} in this plan"
            raise RefusedError(f"resume refused: {what}, which cannot be allowed. Begin anew in another directory.")


def consequences(parts: Parts, changed: dict[str, str], done: int, old: dict[str, Any], steps: int) -> list[str]:
    """A line for each thing that what has changed does to the run."""
    lines = []
    if changed:
        lines.append("allowed to differ: " + "; ".join(f"{name} {how}" for name, how in changed.items()))
    if "optim._target_" in changed:
        lines.append("the optimizer is another one: its state begins anew")
    if old[STEPS] != steps:
        lines.append(another_length(parts.config, parts.plan, done, old, steps))
    return lines


def another_length(config: Config, plan: InjectionPlan, done: int, then: dict[str, Any], new: int) -> str:
    """What another number of steps than ``then`` does to the schedule, and to what a method does over the steps."""
    wanted, old, lr, lr_then = config.schedule, then[STEPS], config.optim.lr, then["optim.lr"]
    before, after = (
        schedule(wanted.kind, warmup=wanted.warmup, total=total, options=wanted.options) for total in (old, new)
    )
    if all(before(step) == after(step) for step in range(1, max(old, new) + 1)):
        what = ["the learning rate does not depend on it"]
    else:
        what = [
            f"the learning rate of the {done} steps done was that of {old} steps ({lr_then * before(done):.3g} at last)"
        ]
        what += [f"from step {done + 1} on it is that of {new} ({lr * after(done + 1):.3g} at first)"] * (done < new)
    courses = {cls.__name__ for cls in (resolve(row.adapter) for row in plan.rows) if has_course(cls)}
    what += [f"what {name} does over the steps is now that of {new}" for name in sorted(courses)]
    return f"{old} → {new} steps: {'; '.join(what)}."


def has_course(cls: type[Adapter]) -> bool:
    """Whether a method does something over time, for which it is told the number of steps."""
    return getattr(cls.hook, "__func__", cls.hook) is not Adapter.hook.__func__  # type: ignore[attr-defined]
