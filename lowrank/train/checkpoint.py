"""Checkpoints: a folder appears whole or not at all, and a flipped bit anywhere in it is found.

Commit: write into ``.staging-…``, fsync every file, write MANIFEST.json (bytes and SHA-256 of each), fsync,
rename to ``step-<number>``, fsync the parent. Safetensors and JSON only; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank.disk import sync
from lowrank.errors import RefusedError
from lowrank.train.hooks import Hook, StepRecord

MANIFEST, STATE, INDEX = "MANIFEST.json", "state.json", "index.json"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: tensors by file (``adapter``, ``optimizer``) and name, and plain values."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(folder: Path, step: int, saved: Saved) -> Path:
    """Commits ``saved`` as ``folder/step-<step>``; one that is there and verifies is left as it is."""
    final = folder / f"step-{step:08d}"
    if final.exists():
        if verify(final) is None:
            return final
        shutil.rmtree(final)
    staging = folder / f".staging-{step:08d}-{os.getpid()}"
    for left in folder.glob(".staging-*"):  # by a crash: the run directory is this process's alone
        shutil.rmtree(left)
    staging.mkdir(parents=True)
    for name, tensors in saved.tensors.items():
        plain = {
            key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
        }
        save_file(plain, staging / f"{name}.safetensors", metadata={"format": "pt"})
    (staging / STATE).write_bytes(canonical(saved.state))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(staging.iterdir())}
    for name in files:
        sync(staging / name)
    (staging / MANIFEST).write_bytes(sealed({"step": step, "files": files}))
    sync(staging / MANIFEST)
    sync(staging)
    staging.rename(final)
    sync(folder)
    return final


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None."""
    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        if sealed({key: manifest[key] for key in ("step", "files")}) != raw:
            return f"{path.parent.name}/{path.name}/{MANIFEST}: not what was written"
        for name, facts in manifest["files"].items():
            where = f"{path.parent.name}/{path.name}/{name}"
            if not (path / name).is_file():
                return f"{where}: missing"
            if (path / name).stat().st_size != facts["bytes"] or sha256(path / name) != facts["sha256"]:
                return f"{where}: sha256 differs from its manifest"
    except FileNotFoundError:
        return f"{path.parent.name}/{path.name}/{MANIFEST}: missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path.parent.name}/{path.name}/{MANIFEST}: not what was written"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with each newer one."""
    wrong: list[str] = []
    for path in reversed(committed(folder)):
        fault = verify(path)
        if fault is None:
            return path, wrong
        wrong.append(fault)
    return None, wrong


def committed(folder: Path) -> list[Path]:
    """Every ``step-<number>`` of the folder, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read(path: Path) -> Saved:
    """The content of a checkpoint that verifies; RefusedError, naming the file, where it does not."""
    fault = verify(path)
    if fault is not None:
        raise RefusedError(f"{fault}.")
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return Saved(tensors, json.loads((path / STATE).read_bytes()))


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` and the best, once the newest has been read back and verifies."""
    paths = committed(folder)
    best = best_of(paths)
    if paths and verify(paths[-1]) is None:
        for path in paths[:-keep]:
            if path != best:
                shutil.rmtree(path)
        index = {"newest": paths[-1].name, "best": best.name if best else None}
        staged = folder / f".{INDEX}.{os.getpid()}"
        staged.write_bytes(canonical(index))
        staged.replace(folder / INDEX)


def best_of(paths: list[Path]) -> Path | None:
    """The checkpoint with the lowest held-out loss, of those that were evaluated at their own step."""
    losses = {}
    for path in paths:
        try:
            loss = json.loads((path / STATE).read_bytes()).get("held_out_loss")
        except (OSError, ValueError):
            continue  # a damaged one cannot be the best; verify names it when it is asked for
        if loss is not None and math.isfinite(loss):
            losses[path] = loss
    return min(losses, key=losses.__getitem__) if losses else None


class Checkpoints(Hook):
    """Saves every ``every`` steps and after the ``last`` (0: never); keeps the newest ``keep`` and the best."""

    def __init__(self, folder: Path, snapshot: Callable[[], Saved], *, every: int, keep: int, last: int) -> None:
        self.folder, self.snapshot, self.every, self.keep, self.last = folder, snapshot, every, keep, last

    def after_step(self, record: StepRecord) -> None:
        if self.every and (record.step % self.every == 0 or record.step == self.last):
            self.save(record.step)

    def save(self, step: int) -> Path:
        path = save(self.folder, step, self.snapshot())
        prune(self.folder, self.keep)
        return path


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Field by field, ``old → new`` (or ``differs`` for hashes), where two identities are not equal."""
    found = {}
    for name in [*saved, *(name for name in now if name not in saved)]:
        old, new = saved.get(name), now.get(name)
        if old != new:
            hashed = isinstance(old, str) and len(old) >= 32
            found[name] = "differs" if hashed else f"{json.dumps(old)} → {json.dumps(new)}"
    return found


def canonical(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest with the hash of itself: a reader writes it again and compares every byte."""
    return canonical({**manifest, "sha256": hashlib.sha256(canonical(manifest)).hexdigest()})


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
