"""The composition root: a configuration trained into a run directory, and a run directory opened again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank import assemble, manifest
from lowrank.adapters import store
from lowrank.adapters.expected import expected
from lowrank.adapters.inject import apply
from lowrank.adapters.plan import InjectionPlan
from lowrank.assemble import Data, Loaded, Parts
from lowrank.config import load as load_config
from lowrank.data.chat import Example
from lowrank.errors import ConfigError, DataError, RefusedError
from lowrank.ledger.dry import DryRun
from lowrank.ledger.shortage import Shortage
from lowrank.models.fingerprint import base_id, fingerprint
from lowrank.record import directory, lock
from lowrank.record.directory import Log
from lowrank.schema import Config
from lowrank.session import resuming
from lowrank.session.session import Session
from lowrank.train import checkpoint
from lowrank.train.metrics import read as read_metrics
from lowrank.train.stopping import Stopping


@dataclass
class Run:
    """A run directory. ``model`` (with its trained adapter, in evaluation mode) is loaded when first asked for."""

    folder: Path

    @cached_property
    def config(self) -> Config:
        path = self.folder / directory.CONFIG
        if not path.is_file():
            raise ConfigError(f"{self.folder}: not a run directory (no {directory.CONFIG} there).")
        return load_config(path)

    @cached_property
    def parts(self) -> Parts:
        """With the precision that the run had: ``auto`` may resolve otherwise on the machine it is opened on."""
        loop = self.config.loop
        recorded = replace(loop, precision=self.summary.get("precision", loop.precision))
        return assemble.parts(replace(self.config, loop=recorded))

    @cached_property
    def loaded(self) -> Loaded:
        return assemble.load(self.parts)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.parts.tokenizer

    @property
    def plan(self) -> InjectionPlan:
        return self.parts.plan

    @property
    def recorded_plan(self) -> InjectionPlan:
        """The plan as the run wrote it down; the model need not be there. Raises ConfigError where there is none."""
        path = self.folder / directory.PLAN_JSON
        if not path.is_file():
            raise ConfigError(f"{self.folder}: no {path.name} there; a run writes it when its training begins.")
        try:
            return InjectionPlan.from_dict(directory.read_json(path))
        except (ValueError, KeyError, TypeError) as error:
            raise RefusedError(f"{path}: not a run's plan ({error}).") from error

    @property
    def base(self) -> dict[str, str]:
        """The hashes of the base's tensors by name, as they lie beside the final adapter; empty before that."""
        return hashes(directory.read_json(self.folder / directory.ADAPTER / store.PLAN), self.folder)

    @cached_property
    def model(self) -> Any:
        base = self.loaded.model
        known = fingerprint(base)
        apply(base, self.plan, state=self.trained(known), keep_base=False)
        return base.requires_grad_(False).eval()

    def trained(self, base: dict[str, str]) -> dict[str, Tensor]:
        """The final adapter's tensors; where there is none yet, or the run went on since, the newest checkpoint's."""
        final, wanted = self.folder / directory.ADAPTER, expected(self.loaded.model, self.plan)
        done = manifest.step_in(final) if final.is_dir() else -1
        checkpoints = self.folder / directory.CHECKPOINTS
        newest, wrong = manifest.newest(checkpoints, after=done) if done is not None else (None, [])
        for fault in wrong:
            print(f"{fault}; using {newest.name if newest else 'none'}.", file=sys.stderr)
        if newest is not None:
            shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
            return checkpoint.read_tensors(newest, "adapter", shapes)
        if not final.is_dir():
            raise RefusedError(f"{self.folder}: no adapter and no checkpoint that verifies.")
        about, tensors = store.read(final, wanted)
        refuse_other_base(hashes(about, self.folder), base)
        return tensors

    def probes(self) -> dict[str, Any]:
        """Tokens of the run's own data for ``save_merged``: ``probe`` held out, 16 rows of 128 ids, to measure on;
        ``calibration`` 64 rows of training ones. Random tokens, which ``notes`` says, where the data is gone."""
        try:
            data = assemble.data(self.config, self.tokenizer)
        except (DataError, ConfigError) as error:
            reason = str(error).splitlines()[0]
            return {"notes": (f"the run's data cannot be read ({reason}): random tokens stand in for it",)}
        width = min(128, getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 128)
        return {"probe": rows_of(data.eval, 16, width), "calibration": rows_of(data.train, 64, width)}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / directory.METRICS)

    @property
    def summary(self) -> dict[str, Any]:
        return directory.read_json(self.folder / directory.SUMMARY)

    @property
    def samples(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / directory.SAMPLES)


def rows_of(examples: Sequence[Example], rows: int, width: int) -> Tensor:
    """Up to ``rows`` rows of ``width`` ids, of examples evenly spaced over all of them and put end to end."""
    tokens = sum(len(example.tokens) for example in examples)
    count = min(len(examples), -(-rows * width * len(examples) // tokens))  # that have so many tokens, on average
    spaced = [n * len(examples) // count for n in range(count)]
    order = [*spaced, *sorted(set(range(len(examples))) - set(spaced))]
    ids = torch.tensor([token for n in order for token in examples[n].tokens][: rows * width])
    width = min(width, len(ids))
    return ids[: len(ids) // width * width].view(-1, width)


def hashes(about: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Those of the base's tensors that an ``adapter.json`` holds; none where it says nothing of them."""
    found = about.get("base", {})
    if not (isinstance(found, dict) and all(isinstance(value, str) for value in found.values())):
        raise RefusedError(f"{folder / directory.ADAPTER / store.PLAN}: base: not a mapping of names to hashes.")
    return found


def refuse_other_base(trained_on: dict[str, str], here: dict[str, str]) -> None:
    if trained_on and trained_on != here:
        name = next(n for n in [*here, *trained_on] if trained_on.get(n) != here.get(n))
        raise RefusedError(
            f"adapter was trained on base {base_id(trained_on)[:8]}…, "
            f"this base is {base_id(here)[:8]}… ({name} differs)."
        )


def refuse_two_bases(first: Run, second: Run) -> None:
    """What two runs have learnt can be compared where they learnt it on one base."""
    one, other = first.base, second.base
    if one != other and one and other:
        name = next(n for n in [*one, *other] if one.get(n) != other.get(n))
        raise RefusedError(
            f"{first.folder} was trained on base {base_id(one)[:8]}…, {second.folder} on base {base_id(other)[:8]}… "
            f"({name} differs): adapters can be compared on one base only."
        )


def open(folder: str | Path) -> Run:
    """An existing run directory. Raises ConfigError where it is none."""
    run = Run(Path(folder))
    run.config  # noqa: B018  read now, so that a wrong folder is said here
    return run


class Assembly(Protocol):
    """Where the parts of a run come from: ``lowrank.assemble``, or what keeps some of them from run to run."""

    def parts(self, config: Config, /) -> Parts: ...
    def data(self, config: Config, tokenizer: PreTrainedTokenizerBase, /) -> Data: ...
    def held(self, parts: Parts, /) -> int: ...
    def load(self, parts: Parts, /) -> Loaded: ...


def train(
    config: Config,
    folder: str | Path,
    command: str | None = None,
    stopping: Stopping | None = None,
    made: Assembly = assemble,
) -> Run:
    """Trains what ``config`` describes in the run directory ``folder``; ``command`` is what reproduces it.

    Raises the errors of ``lowrank.errors``; where nothing was trained, no directory is left.
    """
    folder, log = Path(folder), Log()
    with (stopping or Stopping()).installed() as stopping, stopping.at_once(), lock.owned(folder):
        resuming.refuse_second_run(config, folder)
        resuming.check_allowed(config, folder)
        parts, data = read(config, log, made)
        shortage = Shortage.of(parts, data, made.held(parts))
        if warning := shortage.warning():
            log.say(warning)
        with shortage.told():
            loaded = load(parts, log, made)
            session = Session(parts, data, loaded, folder, log, command, stopping, shortage)
            if session.finished:
                log.say(f"{folder}: this run is done; nothing to resume.")
                return open(folder)
            session.run()
    run = Run(folder)
    run.__dict__.update(config=config, parts=parts, loaded=loaded, model=loaded.model)
    return run


def plan(config: Config, folder: str | Path) -> Iterator[str]:
    """The dry run, as it is found: the injection plan, then the ledger, which is written to ``folder`` as what is
    predicted of a run there. Reads the data and no weight. Raises the errors of ``lowrank.errors``."""
    folder, dry = Path(folder), DryRun(config)
    with lock.owned(folder):
        resuming.refuse_second_run(config, folder)
        yield str(dry.parts.plan)
        told = directory.read_json(folder / directory.LEDGER)
        directory.write_json(folder / directory.LEDGER, {**told, "predicted": dry.ledger.to_dict()})
        yield str(dry.ledger)
        if dry.speed is not None:
            directory.write_json(folder / directory.LEDGER, {**told, "predicted": dry.with_speed.to_dict()})
            yield str(dry.speed)


def assembled(config: Config, log: Log) -> tuple[Parts, Data, Loaded]:
    """All that a session is made of, each told of as soon as it is known."""
    parts, data = read(config, log)
    return parts, data, load(parts, log)


def read(config: Config, log: Log, made: Assembly = assemble) -> tuple[Parts, Data]:
    """What is known before a weight is read."""
    parts = made.parts(config)
    log.say(str(parts))
    data = made.data(config, parts.tokenizer)
    log.say(str(data))
    assemble.check_length(parts, data)
    return parts, data


def load(parts: Parts, log: Log, made: Assembly = assemble) -> Loaded:
    loaded = made.load(parts)
    for note in (*parts.plan.notes, *loaded.notes):
        log.say(note)
    return loaded
