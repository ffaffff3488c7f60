"""Fresh processes, one after the other, and what the machine was while they ran. Linux only: /proc is read."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lowrank", "torch", "transformers", "peft", "accelerate", "trl", "liger-kernel", "triton")
ABSENT = 3  # exit code of an arm whose packages are not here
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Done:
    """What a process printed, or how it failed; the share of the machine's time that others took meanwhile."""

    output: str
    failed: str
    others: float


def run(module: str, folder: Path, *arguments: str, env: dict[str, str]) -> Done:
    """``python -m module folder arguments``. Raises SystemExit for a failure that is no result of its own."""
    started, busy, own = time.monotonic(), busy_seconds(), children_seconds()
    command = [sys.executable, "-m", module, str(folder), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    others = (busy_seconds() - busy) - (children_seconds() - own)
    share = max(0.0, others / (time.monotonic() - started) / (os.cpu_count() or 1))
    return Done(done.stdout, failure(done.returncode, done.stderr, module), share)


def failure(code: int, said: str, module: str) -> str:
    """Empty where it went well; out of memory and absence are results too."""
    if code == 0:
        return ""
    if code == ABSENT and "not installed" in said:
        return "not installed"
    if any(text in said for text in OUT_OF_MEMORY) or code == -9:
        return "out of memory"
    raise SystemExit(f"{said}\n{module}: exit code {code}")


def environment(threads: int | None) -> dict[str, str]:
    """The arms' environment: nothing is fetched, and all have the same threads."""
    changed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        changed |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {**os.environ, **changed}


def busy_seconds() -> float:
    """CPU time the whole machine has spent on anything since it started, time stolen by its host included."""
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def machine() -> dict[str, Any]:
    """The processor, what of its features decides over matrix products, and how many cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    about = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")
    flags = about.get("flags", "").split()
    return {
        "cpu": about.get("model name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in wanted if flag in flags],
    }


def conditions(device: str, threads: int | None) -> dict[str, Any]:
    """All that figures depend on beside the work itself."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **machine(),
        "threads": threads or int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "commit": commit(),
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The checkout's, with a plus behind it where files were changed since; empty outside of one."""
    try:
        found = [
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found[0] + ("+" if found[1] else "")
