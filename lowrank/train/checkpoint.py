"""Checkpoints: what one holds, how it is read back, which ones stay, and when a run writes one.

Safetensors and JSON only; nothing is ever unpickled. How a folder is committed and verified is in ``manifest``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank import manifest
from lowrank.disk import discard, sync, write_text
from lowrank.errors import NumericsError, RefusedError
from lowrank.manifest import canonical, committed, newest, read_json, verify
from lowrank.train import tensors
from lowrank.train.background import Files, Foreground, Writer
from lowrank.train.early import better
from lowrank.train.hooks import Hook, StepRecord

__all__ = ["Checkpoints", "Saved", "committed", "newest", "prune", "read", "read_tensors", "save", "verify"]

STATE, INDEX = "state.json", "index.json"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: tensors by file (``adapter``, ``optimizer``) and name, and plain values."""

    tensors: Files
    state: dict[str, Any]


def save(folder: Path, step: int, saved: Saved) -> Path:
    """Commits ``saved`` as ``folder/step-<step>``; one that is there, verifies and has this state is left as it is."""
    final, state = folder / name_of(step), canonical(saved.state)
    clear(folder)
    if sound(final) and canonical(read_state(final)) == state:
        return final
    with manifest.committing(final, step=step) as staging:
        for name, held in saved.tensors.items():
            staging.write(f"{name}.safetensors", tensors.pieces(held))
        staging.write(STATE, [state])
    return final


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def sound(path: Path) -> bool:
    return path.is_dir() and verify(path) is None


def clear(folder: Path) -> None:
    """Removes what a crash left: the run directory is this process's alone."""
    for pattern in (".staging-*", f".{INDEX}.*"):
        for left in folder.glob(pattern):
            discard(left)


def read(path: Path) -> Saved:
    """The content of a checkpoint that verifies; RefusedError, naming the file, where it does not."""
    refuse_fault(path)
    found = {file.stem: tensors.read(file) for file in sorted(path.glob("*.safetensors"))}
    return Saved(found, read_state(path))


def read_tensors(path: Path, file: str, shapes: tensors.Shapes | None = None) -> dict[str, Tensor]:
    """One file of tensors (``adapter``) of a checkpoint that verifies; RefusedError where it does not, or where they
    are not of these names and ``shapes``."""
    refuse_fault(path)
    return tensors.read(path / f"{file}.safetensors", shapes)


def refuse_fault(path: Path) -> None:
    fault = verify(path)
    if fault is not None:
        raise RefusedError(f"{fault}.")


def read_state(path: Path) -> dict[str, Any]:
    try:
        return read_json(path / STATE)
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path / STATE}: cannot be read: {error}.") from error


def prune(folder: Path, keep: int, known: Iterable[str] = ()) -> set[str]:
    """Deletes what is older than the newest ``keep`` that verify, except the best; index.json names newest and best.

    ``known`` are folders that were seen to verify, by name; any other is read back first. Returns all that do.
    """
    paths = committed(folder)
    good = [path for path in paths if path.name in known or verify(path) is None]
    if not good:
        return set()
    best = best_of(good[-1])
    write_text(folder / INDEX, canonical({"newest": good[-1].name, "best": best.name if best else None}).decode())
    kept = {best, *paths[paths.index(good[-keep:][0]) :]}
    manifest.remove(path for path in paths if path not in kept)
    return {path.name for path in good if path in kept}


def best_of(path: Path) -> Path | None:
    """The folder with the lowest held-out loss so far, as the state of checkpoint ``path`` has it, if it is there."""
    best = checked_best(read_state(path).get("best"))
    found = path.with_name(name_of(best["step"])) if best else None
    return found if found is not None and found.is_dir() else None


def checked_best(value: Any) -> dict[str, Any] | None:
    """A state's ``best``, if it is what ``better`` makes."""
    kinds = {name: type(held) for name, held in value.items()} if isinstance(value, dict) else {}
    return value if kinds == {"step": int, "loss": float} else None


def refuse_not_finite(trained: Mapping[str, Tensor], step: int) -> None:
    """Raises NumericsError, naming the first tensor with a value that is NaN or infinite."""
    for name, tensor in trained.items():
        if not torch.isfinite(tensor.detach()).all():
            raise NumericsError(f"step {step}: {name} is not finite after the update, so it is not saved")


class Checkpoints(Hook):
    """Saves every ``every`` steps and after the ``last`` (0: never); keeps the newest ``keep`` and the best.

    ``trained`` are refused where they are not finite; ``beside`` are files that a checkpoint's state tells of, and
    that are on the disk before it is committed. ``snapshot``'s ``held_out_loss``, if any, decides which is the best.
    """

    def __init__(
        self,
        folder: Path,
        snapshot: Callable[[], Saved],
        *,
        every: int,
        keep: int,
        last: int,
        trained: Mapping[str, Tensor] | None = None,
        beside: Iterable[Path] = (),
        writer: Writer | None = None,
    ) -> None:
        self.folder, self.snapshot, self.every, self.keep, self.last = folder, snapshot, every, keep, last
        self.trained, self.beside, self.writer = trained or {}, tuple(beside), writer or Foreground()
        self.best: dict[str, Any] | None = None  # its step and held-out loss
        self.latest: int | None = None  # the step that was saved last
        self.known: set[str] = set()  # folders that were read back and verified

    def after_step(self, record: StepRecord) -> None:
        self.writer.check()
        if self.every and (record.step % self.every == 0 or record.step == self.last):
            self.begin(record.step)

    def save(self, step: int) -> Path:
        """The step's checkpoint for an ending: what is there if it is good, else committed when this returns."""
        self.writer.wait()
        path = self.folder / name_of(step)
        if self.latest != step and not sound(path):
            self.begin(step)
            self.writer.wait()
        return path

    def begin(self, step: int) -> None:
        """Hands the writer what is to be saved. Raises NumericsError where it must not be."""
        self.writer.wait()  # it holds one copy
        refuse_not_finite(self.trained, step)
        found = self.snapshot()
        self.best = better(self.best, step, found.state.get("held_out_loss"))
        state = copy.deepcopy({**found.state, "best": self.best})  # hooks go on changing theirs
        self.writer.start(partial(self.commit, step, Saved(self.writer.held(found.tensors), state)))

    def commit(self, step: int, saved: Saved) -> None:
        for path in self.beside:
            if path.exists():
                sync(path)
        path = save(self.folder, step, saved)
        self.known = prune(self.folder, self.keep, self.known - {path.name})
        self.latest = step

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on after the checkpoint with this state; does what a crash after its commit has kept from being done."""
        self.best = checked_best(state.get("best"))
        clear(self.folder)
        self.known = prune(self.folder, self.keep)

    def wait(self) -> None:
        """Until what was begun is committed; raises what went wrong in it."""
        self.writer.wait()

    def close(self) -> BaseException | None:
        """For every ending: returns what went wrong in the background and has not been raised."""
        return self.writer.close()
