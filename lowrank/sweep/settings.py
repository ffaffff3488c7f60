"""What a process has set for all of its code, as a fresh one has it: put back between jobs."""

from __future__ import annotations

import os
import random
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Settings:
    """A job's code, or a user's adapter, may change them; the next job must not see it."""

    draws: tuple[Any, Any, torch.Tensor, list[torch.Tensor]]  # Python's generator, NumPy's, torch's
    numbers: tuple[torch.dtype, torch.device, bool, bool, int]
    environment: dict[str, str]
    place: str
    path: list[str]
    filters: list[Any]

    @classmethod
    def now(cls) -> Settings:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(
            (random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda),
            (
                torch.get_default_dtype(),
                torch.get_default_device(),
                torch.is_grad_enabled(),
                torch.are_deterministic_algorithms_enabled(),
                torch.get_num_threads(),
            ),
            dict(os.environ),
            os.getcwd(),
            [*sys.path],
            [*warnings.filters],
        )

    def put_back(self) -> None:
        python, numpy, cpu, cuda = self.draws
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        dtype, device, grad, deterministic, threads = self.numbers
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_grad_enabled(grad)
        torch.use_deterministic_algorithms(deterministic)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        self.put_back_surroundings()

    def put_back_surroundings(self) -> None:
        for name in os.environ.keys() - self.environment.keys():
            del os.environ[name]
        for name, value in self.environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        os.chdir(self.place)
        sys.path[:] = self.path
        warnings.filters[:] = self.filters  # type: ignore[index]  # a list, whatever its stub says
