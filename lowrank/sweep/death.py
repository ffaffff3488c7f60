"""A job ends with the process that has started it, however that ends: Linux sends it a signal."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from lowrank.errors import Interrupted

LAUNCHER = "LOWRANK_LAUNCHER"  # the number of the process that starts a job, told to it
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_launcher() -> None:
    """In a process that a sweep has started: from now on its launcher's death is a SIGTERM, at which a run saves.
    Elsewhere nothing. Raises Interrupted where the launcher was gone before this could be asked for."""
    launcher = os.environ.pop(LAUNCHER, "")  # a child of this one has another parent
    if not launcher:
        return
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(launcher):
        raise Interrupted("the sweep that has started this job is gone. No step was made.")
