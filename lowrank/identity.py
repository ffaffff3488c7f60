"""What a run's numbers depend on, hashed or written out, so that a resume can refuse what has changed."""

from __future__ import annotations

import hashlib
import inspect
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lowrank.adapters.plan import InjectionPlan, resolve
from lowrank.config import Config

PACKAGES = ("lowrank", "torch", "transformers", "tokenizers", "safetensors", "bitsandbytes")
FREE = ("checkpoint", "eval", "track")  # groups that cannot change what is trained


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def identity(
    config: Config, *, plan: InjectionPlan, data: str, base: str, precision: str, device: str, fast: str
) -> dict[str, Any]:
    """Flat, so that differences can be told field by field. ``data`` and ``base`` are hashes of content."""
    return {
        **{name: value for name, value in flat(config.to_dict()).items() if name.split(".")[0] not in FREE},
        "data": data,
        "base": base,
        "plan": hashlib.sha256(repr(plan.to_dict()).encode()).hexdigest(),
        "code": code_hash(plan),
        "precision": precision,
        "device": device,
        "fast": fast,
        "threads": torch.get_num_threads(),
        **{f"versions.{name}": value for name, value in versions().items()},
    }


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} → {"optim.lr": 1}."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def code_hash(plan: InjectionPlan) -> str:
    """SHA-256 over this package's sources and the file of every adapter class in the plan."""
    package = Path(__file__).parent
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    for name in {row.adapter for row in plan.rows}:
        path = Path(inspect.getfile(resolve(name)))
        if not path.is_relative_to(package):
            files[f"adapter {name}"] = path
    hashed = hashlib.sha256()
    for name in sorted(files):
        hashed.update(f"{name}\n".encode())
        hashed.update(files[name].read_bytes())
    return hashed.hexdigest()
