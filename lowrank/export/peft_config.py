"""What ``adapter_config.json`` says, read as JSON and checked field by field; what a method has not is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lowrank import foreign
from lowrank.errors import RefusedError
from lowrank.export.peft_regex import is_regex

CONFIG = "adapter_config.json"
LARGEST = 8 * 2**20  # bytes: what AdaLoRA keeps of every site of a large model is a third of that

Modules = str | list[str] | None  # as PEFT has it: a regular expression, or paths and ends of paths


class Field(NamedTuple):
    """A field that is read."""

    default: Any  # PEFT's own
    allowed: Callable[[Any], bool]
    words: str  # what is allowed


@dataclass(frozen=True)
class Config:
    """The fields that a method reads, with PEFT's defaults where the file has none."""

    file: Path
    fields: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def refusal(self, name: str, words: str) -> RefusedError:
        return RefusedError(f"{self.file}: {name}: {json.dumps(self[name])[:80]} is not supported; {words}.")

    def at(self, path: str, name: str, pattern: str) -> Any:
        """The value of a field at a site, for which ``pattern`` may name another one.

        Raises RefusedError where two keys of the pattern give the site two values: PEFT takes the first one, but
        sorts the keys when it saves, so the file does not say which that was.
        """
        found = self.choices(path, name, pattern)
        if len({*found.values()}) > 1:
            raise RefusedError(f"{self.file}: {pattern}: {' and '.join(map(repr, found))} differ on {path}.")
        return next(iter(found.values()))

    def choices(self, path: str, name: str, pattern: str) -> dict[str, Any]:
        here = {key: value for key, value in (self[pattern] or {}).items() if re.match(at_the_end(key), path)}
        return here or {name: self[name]}

    def check_rank(self, path: str, r: int) -> None:
        """Raises RefusedError where the rank of a site's tensors is none that the file gives it."""
        promised = self.choices(path, "r", "rank_pattern")
        if r not in promised.values():
            first = next(iter(promised.values()))
            raise RefusedError(f"{self.file}: says rank {first} for {path}, but its tensors have rank {r}.")

    def targets(self, path: str) -> bool:
        """Whether ``target_modules`` names the path; False where it leaves the choice to PEFT."""
        if self["layers_to_transform"] is not None:
            return False
        return hits(self["target_modules"], path) and not hits(self["exclude_modules"], path)


def at_the_end(pattern: str) -> str:
    """PEFT's rule: a key matches the whole path or, from a dot on, its end."""
    return rf"(.*\.)?({pattern})$"


def hits(modules: Modules, path: str) -> bool:
    if isinstance(modules, list):
        return any(path == name or path.endswith(f".{name}") for name in modules)
    return modules is not None and modules != "all-linear" and re.fullmatch(modules, path) is not None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_size(value: Any) -> bool:
    return is_number(value) and 0 < value < float("inf")


def is_modules(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return value is None or (isinstance(value, str) and is_regex(value))


def pattern(check: Callable[[Any], bool], words: str) -> Field:
    """Of values by site: its keys are regular expressions."""

    def allowed(value: Any) -> bool:
        return value is None or (
            isinstance(value, dict) and all(is_regex(at_the_end(key)) and check(one) for key, one in value.items())
        )

    return Field(None, allowed, f"a mapping of regular expressions to {words}")


def count(default: int | None) -> Field:
    return Field(default, is_count, "a positive integer")


def size(default: float) -> Field:
    return Field(default, is_size, "a positive number")


def flag(default: bool) -> Field:
    return Field(default, is_flag, "true or false")


DROPOUT = Field(0.0, lambda v: is_number(v) and 0 <= v < 1, "a number from 0 up to, but not including, 1")
NO_BIAS = Field("none", lambda v: v == "none", "none")
MODULES = Field(None, is_modules, "a list of names or a regular expression without repetitions in repetitions")
RANKS, ALPHAS = pattern(is_count, "positive integers"), pattern(is_size, "positive numbers")
TARGETS = {
    "target_modules": MODULES,
    "exclude_modules": MODULES,
    "layers_to_transform": Field(None, lambda v: v is None or isinstance(v, (int, list)), "a list of layers"),
}

# Fields of every method that do not change what is computed here. Which sites there are is seen from the tensors, and
# fan_in_fan_out from the module.
NEUTRAL = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("peft_version", "fan_in_fan_out", "layers_pattern", "init_weights"),
}


def read_json(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Raises RefusedError naming the file where it is missing or damaged."""
    if not (folder / CONFIG).exists():
        raise RefusedError(f"{folder}: no {CONFIG} there, so it is not a PEFT adapter's folder.")
    return folder / CONFIG, foreign.read_json(folder, CONFIG, LARGEST)


def checked(file: Path, given: Mapping[str, Any], reads: Mapping[str, Field], neutral: Collection[str]) -> Config:
    """Raises RefusedError naming the file and the field where it asks for what the method does not have."""
    for name, value in given.items():
        if name not in reads and name not in neutral and name not in NEUTRAL and value not in (None, False, "", [], {}):
            raise RefusedError(f"{file}: {name}: {json.dumps(value)[:80]} is not supported with {given['peft_type']}.")
    config = Config(file, {name: given.get(name, field.default) for name, field in reads.items()})
    for name, field in reads.items():
        if not field.allowed(config[name]):
            raise config.refusal(name, field.words)
    return config
