"""A base that stays in memory from job to job, and what else a job need not make anew."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from lowrank import assemble
from lowrank.adapters.inject import names_parameter
from lowrank.adapters.sites import parameters
from lowrank.assemble import Data, Loaded, Parts
from lowrank.fast import heap
from lowrank.ledger import process
from lowrank.ledger.resident import by_part, size_of
from lowrank.models import load as models
from lowrank.models.fingerprint import checksum, fingerprint
from lowrank.models.twin import twin
from lowrank.schema import Config, Model

KEPT = 2  # tokenizers, and sets of examples
Value = TypeVar("Value")


@dataclass(frozen=True)
class Base:
    """``key``: what it was loaded for; ``sum``: of its bytes as they were then."""

    key: Hashable
    loaded: Loaded
    sum: int


class Resident:
    """``lowrank.assemble`` for one job after another: each gets a twin of one base (models.twin), which so stays as it
    was. One that has changed all the same, by an adapter that writes into it, is loaded anew.

    Tokenizers and examples are kept by the state of the files that they are made of.
    """

    def __init__(self) -> None:
        self.base: Base | None = None
        self.before: int | None = None  # bytes of the process before it had one …
        self.libraries = 0  # … and what the ledger adds for those that jobs have loaded since
        self.tokenizers: dict[Hashable, PreTrainedTokenizerBase] = {}
        self.examples: dict[Hashable, Data] = {}

    def parts(self, config: Config) -> Parts:
        return assemble.parts(config, self.tokenizer)

    def tokenizer(self, model: Model) -> PreTrainedTokenizerBase:
        key = files_of(models.folder(model))
        return kept(self.tokenizers, key, lambda: models.tokenizer(model))

    def data(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
        given = config.data
        files = tuple(state(Path(path)) for path in (given.path, given.eval_path) if path is not None)
        return kept(self.examples, (repr(given), files, id(tokenizer)), lambda: assemble.data(config, tokenizer))

    def held(self, parts: Parts) -> int:
        """Bytes of the process that the ledger counts of the run elsewhere: the base that it will share, and what
        earlier jobs have loaded of libraries. Of a base that is another's nothing is left."""
        if self.base is not None and self.base.key != key_of(parts):
            self.drop()
        now, own = process.interpreter(parts.device), 0
        if self.base is not None:
            known = parameters(self.base.loaded.model)
            own = size_of(known[path] for path in trained(parts))
        return now - self.beside(now, parts.device) - own

    def interpreter(self) -> int | None:
        """Bytes of the process beside a base that is there, as a run counts them that trains nothing of it."""
        if self.base is None:
            return None
        device = next(self.base.loaded.model.parameters()).device
        return self.beside(process.interpreter(device), device)

    def beside(self, now: int, device: torch.device) -> int:
        """Of ``now`` bytes what is neither the base nor libraries; no less than there were before both."""
        if self.before is None:
            self.before = now
        base = 0 if self.base is None else sum(by_part(self.base.loaded.model).values())
        return max(self.before, now - base - self.libraries)

    def load(self, parts: Parts) -> Loaded:
        """Modules of the job's own over the one base; of parameters that are to train, copies."""
        key = key_of(parts)
        if self.base is not None and (self.base.key != key or checksum(self.base.loaded.model) != self.base.sum):
            self.drop()
        if self.base is None:
            fresh = assemble.load(parts)
            known = replace(fresh, hashes=fingerprint(fresh.model))
            self.base = Base(key, known, checksum(fresh.model))
            quantised = parts.config.quant.kind != "none"
            self.libraries = max(self.libraries, process.slack(parts.device, quantised, 0.0, 0, 0))
        return replace(self.base.loaded, model=twin(self.base.loaded.model, trained(parts)))

    def drop(self) -> None:
        self.base = None
        gc.collect()
        heap.give_back()


def trained(parts: Parts) -> list[str]:
    """The base's own parameters that are to train."""
    return [row.path for row in parts.plan.rows if names_parameter(row)]


def key_of(parts: Parts) -> Hashable:
    """All that ``assemble.load`` depends on."""
    config = parts.config
    files = files_of(models.folder(config.model))
    return repr((config.model, config.quant)), files, parts.device, parts.dtype, config.loop.fast


def files_of(folder: Path) -> Hashable:
    return folder, tuple(state(path) for path in sorted(folder.iterdir()) if path.is_file())


def state(path: Path) -> Hashable:
    """What changes with a file; None where there is none, which whoever reads it says."""
    try:
        found = path.stat()
    except OSError:
        return path, None
    return path, found.st_ino, found.st_size, found.st_mtime_ns


def kept(memory: dict[Any, Value], key: Hashable, make: Callable[[], Value]) -> Value:
    """The value of a key, made the first time; the oldest of more than ``KEPT`` goes."""
    if key not in memory:
        memory[key] = make()
        while len(memory) > KEPT:
            del memory[next(iter(memory))]
    return memory[key]
