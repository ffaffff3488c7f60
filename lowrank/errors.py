"""The errors a user meets, each with its exit code, and the search for the name that was meant.

Everything here is printed as one block without a traceback (``LOWRANK_DEBUG=1`` brings it back).
Any other exception is a bug, ours or a user's adapter's, and keeps its full traceback.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class LowrankError(Exception):
    """A condition we understand; ``exit_code`` is what the process ends with."""

    exit_code = 1


class ConfigError(LowrankError):
    """The configuration, a plan or a model's name is wrong: nothing was trained."""

    exit_code = 2


class OutOfMemory(LowrankError):
    """A device, or the machine, could not hold the run."""

    exit_code = 3


class DataError(LowrankError):
    """A data file, a column or a row is wrong."""

    exit_code = 4


class NumericsError(LowrankError):
    """A loss or a gradient was not finite; the parameters are those of the step before."""

    exit_code = 5


class RefusedError(LowrankError):
    """A resume, a checkpoint, an adapter or a run directory that must not be used as asked."""

    exit_code = 6


class Interrupted(LowrankError):
    """A signal asked the run to stop; it finished its step and saved."""

    exit_code = 130


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name closest to ``name``, whatever their case, or None where none is close enough to be a slip."""
    names = {one.casefold(): one for one in allowed}
    matches = difflib.get_close_matches(name.casefold(), list(names), n=1, cutoff=0.5)
    return names[matches[0]] if matches else None


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'lr'?`` or the empty string, ready to append to a sentence."""
    found = nearest(name, allowed)
    return f" Did you mean '{found}'?" if found else ""


NO_MEMORY = re.compile(r"out of memory|(cannot|can't) allocate memory|bad_alloc|alloc_failed", re.IGNORECASE)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or the machine: torch's own errors are known by their names, those of
    the libraries below it by what they say, wherever in the chain of causes they stand."""
    chain: BaseException | None = error
    while chain is not None:
        if {cls.__name__ for cls in type(chain).__mro__} & {"OutOfMemoryError", "MemoryError"}:
            return True
        machine = isinstance(chain, (RuntimeError, OSError)) or type(chain).__name__ == "SafetensorError"
        if machine and (getattr(chain, "errno", None) == errno.ENOMEM or NO_MEMORY.search(str(chain))):
            return True
        chain = chain.__cause__
    return False
