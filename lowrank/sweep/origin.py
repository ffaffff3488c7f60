"""What a job's result is a function of: its settings, its code, its data and its base, each hashed.

No torch at the top; the classes that a configuration names are looked up, which imports it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowrank.classes import find
from lowrank.record import source
from lowrank.schema import Config

# What cannot change a result, keys or groups. Of paths the content counts.
UNTOUCHED = ("checkpoint", "track", "loop.max_seconds", "loop.trace_nonfinite", "loop.offload", "loop.profile")
PATHS = ("data.path", "data.eval_path")
LENGTH = 8  # hexadecimal digits


@dataclass(frozen=True)
class Origin:
    settings: str
    code: str
    data: str
    base: str

    @classmethod
    def of(cls, config: Config) -> Origin:
        tree = config.to_dict()
        for path in (*UNTOUCHED, *PATHS):
            group, _, key = path.partition(".")
            tree[group].pop(key) if key else tree.pop(group)
        settings = hashed(json.dumps(tree, sort_keys=True, default=repr))
        return cls(settings, source.code_hash(source.files(named(config))), data(config), base(config.model.name))

    @property
    def digest(self) -> str:
        return hashed(json.dumps(asdict(self), sort_keys=True))[:LENGTH]

    def differing(self, other: Origin) -> list[str]:
        mine, others = asdict(self), asdict(other)
        return [name for name, value in mine.items() if others[name] != value]


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def named(config: Config) -> list[type]:
    """The classes that a configuration names."""
    targets = config.adapter.targets
    overrides = targets.values() if isinstance(targets, dict) else ()
    adapters = {config.adapter.target, *(str(own["_target_"]) for own in overrides if "_target_" in own)}
    return [*(find(target, "adapter") for target in sorted(adapters)), find(config.optim.target, "optim")]


def data(config: Config) -> str:
    """Of the data's bytes; Python's own library is the version's."""
    if config.data.kind == "stdlib":
        return f"Python {platform.python_version()}"
    return " ".join(content(path) if path else "none" for path in (config.data.path, config.data.eval_path))


def content(path: str) -> str:
    """The SHA-256 of a file's bytes. What cannot be read fails its own job, later."""
    try:
        about = Path(path).stat()
        return of_bytes(path, about.st_size, about.st_mtime_ns)
    except OSError:
        return "unreadable"


@cache
def of_bytes(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base(name: str | None) -> str:
    """Of a model's own folder the files' names, sizes and times: their bytes would take long. Of the hub the name."""
    folder = Path(name) if name else None
    if folder is None or not folder.is_dir():
        return str(name)
    found: list[Any] = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()]
    return hashed(json.dumps(sorted(found)))
