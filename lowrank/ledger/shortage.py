"""What is said of memory that is not there: before it is taken, and when an allocation has failed."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lowrank.assemble import Data, Parts
from lowrank.errors import LowrankError, OutOfMemory, out_of_memory
from lowrank.ledger import process
from lowrank.ledger.fit import Search, Setting
from lowrank.ledger.room import gib, room
from lowrank.ledger.shapes import at_most, of_data
from lowrank.models import load as models

CLEARLY = 1.1  # times what there is: a prediction is within a twentieth
ROOM = 0.9  # of what was predicted, for settings that are to fit where that itself did not
NAMED = 3  # settings


@dataclass(frozen=True)
class Shortage:
    """A run, and the bytes that its process took before it had a model."""

    parts: Parts
    data: Data | None
    interpreter: int

    @classmethod
    def of(cls, parts: Parts, data: Data | None, held: int = 0) -> Shortage:
        """Of a run whose weights are not read yet, but for so many bytes that the process holds of them."""
        return cls(parts, data, max(0, process.interpreter(parts.device) - held))

    def warning(self) -> str | None:
        """A line, before a weight is read, where what is predicted clearly exceeds what there is; else None. A run that
        can be seen to be small is not predicted: that takes a second or two."""
        there = room(self.parts.device)
        if roughly(self.parts, self.data) < there / 4:
            return None
        try:
            search = Search(self.parts, self.data, there, self.interpreter)
            size = search.own.ledger.peak
            if size < CLEARLY * there:
                return None
            return f"memory: the run needs ≈ {gib(size)} of {gib(there)} on {self.parts.device}. {advice(search)}"
        except Exception as failed:  # the model's own code, on tensors without values
            return f"memory: no prediction ({type(failed).__name__}: {str(failed).partition(chr(10))[0]})"

    def explained(self, error: BaseException) -> OutOfMemory | None:
        """What to say of a failed allocation, and what would fit; None of any other error. What the frames that failed
        hold is let go of first."""
        if isinstance(error, LowrankError) or not out_of_memory(error):
            return None
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        let_go(error, self.parts.device)
        first = f"{'CUDA' if self.parts.device.type == 'cuda' else 'CPU'} out of memory"
        try:
            return OutOfMemory(f"{first}: {self.needed()}\n{said}")
        except Exception as failed:  # a prediction needs memory too, and runs the model's own code
            return OutOfMemory(
                f"{first}: {said}\nLess is needed with a smaller loop.micro_batch (and as much more loop.accumulate), "
                f"with loop.gradient_checkpointing=block, or with quant=nf4. (No prediction: {type(failed).__name__}.)"
            )

    def needed(self) -> str:
        """``the run needs ≈ 41.2 GiB of 23.7 GiB. These fit: …``"""
        there = room(self.parts.device)
        search = Search(self.parts, self.data, there, self.interpreter)
        size = search.own.ledger.peak
        search.budget = min(there, int(ROOM * size))
        return f"the run needs ≈ {gib(size)} of {gib(there)}. {advice(search)}"

    @contextmanager
    def told(self) -> Iterator[None]:
        """A failed allocation inside is raised as ``OutOfMemory``."""
        try:
            yield
        except Exception as error:
            if (known := self.explained(error)) is None:
                raise
            raise known from error


def roughly(parts: Parts, data: Data | None) -> float:
    """Bytes, more likely too many than too few: weights, what trains, and 64 bytes a token, layer and number of the
    hidden state for what is kept for backward."""
    text = models.config(parts.config.model).get_text_config()
    longest = parts.config.data.max_length
    tokens = (of_data(parts, data, True) if data else at_most(parts.config, longest, True, "")).tokens
    kept = 64 * tokens * text.hidden_size * text.num_hidden_layers
    return parts.plan.total_parameters * parts.dtype.itemsize + 16 * parts.plan.trainable_parameters + kept


def let_go(error: BaseException, device: torch.device) -> None:
    """Frees the tensors of the frames, of an error and what caused it, that have ended."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def advice(search: Search) -> str:
    """``These fit: loop.micro_batch=2 loop.accumulate=4 (19.8 GiB); …``"""
    found = search.found(NAMED)
    if found:
        return f"These fit: {'; '.join(shown(one) for one in found)}."
    least: Setting = min(search.known.values(), key=lambda setting: setting.ledger.peak)
    return f"Nothing that was tried fits; the least is {shown(least)}."


def shown(setting: Setting) -> str:
    changes = f", with {' and '.join(setting.changes)}" if setting.changes else ""
    return f"{setting} ({gib(setting.ledger.peak)}{changes})"
