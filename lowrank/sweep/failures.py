"""The jobs of this process's sweep that failed: a sweeper may take a failure for an answer, the command does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank.errors import LowrankError


class Failures:
    """Over all batches of a sweep."""

    def __init__(self) -> None:
        self.jobs, self.causes = 0, dict[Path, str]()

    def note(self, folder: Path, cause: str) -> None:
        """A job's end; ``cause`` is empty where it did not fail."""
        self.jobs += 1
        self.causes.pop(folder, None)
        if cause:
            self.causes[folder] = cause

    @contextmanager
    def named(self) -> Iterator[None]:
        """Raises as ``refuse`` does when what is inside is through, or ends in a sweeper's complaint that there is no
        best job: Optuna's ValueError where every job failed."""
        try:
            yield
        except ValueError:
            if not self.causes or len(self.causes) < self.jobs:
                raise
        self.refuse()

    def refuse(self) -> None:
        """Raises LowrankError, which names each, where a job failed."""
        if self.causes:
            lines = [f"  {folder}: {cause}" for folder, cause in self.causes.items()]
            raise LowrankError("\n".join([f"{len(lines)} of {self.jobs} jobs failed:", *lines]))


failures = Failures()  # Hydra makes the launcher and tells the entry nothing of it
