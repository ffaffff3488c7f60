"""What ``adapter_config.json`` says, read as JSON and checked field by field: whatever is not plain LoRA is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.errors import RefusedError

CONFIG = "adapter_config.json"

Modules = str | list[str] | None  # as PEFT has it: a regular expression, or paths and ends of paths


@dataclass(frozen=True)
class PeftLoRA:
    """The fields that say what a plain LoRA computes and where it stands."""

    file: Path
    r: int
    alpha: float
    dropout: float
    rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: Modules
    exclude_modules: Modules

    def alpha_of(self, path: str) -> float:
        """Raises RefusedError where two keys of ``alpha_pattern`` give the path two values: PEFT takes the first one,
        but sorts the keys when it saves, so the file does not say which that was."""
        found = matching(self.alpha_pattern, path) or {"lora_alpha": self.alpha}
        if len({*found.values()}) > 1:
            raise RefusedError(f"{self.file}: alpha_pattern: {' and '.join(map(repr, found))} differ on {path}.")
        return next(iter(found.values()))

    def check_rank(self, path: str, r: int) -> None:
        """Raises RefusedError where the rank of a site's tensors is none that the file gives it."""
        promised = matching(self.rank_pattern, path) or {"r": self.r}
        if r not in promised.values():
            first = next(iter(promised.values()))
            raise RefusedError(f"{self.file}: says rank {first} for {path}, but its tensors have rank {r}.")

    def targets(self, path: str) -> bool:
        """Whether ``target_modules`` names the path; False where it leaves the choice to PEFT."""
        return hits(self.target_modules, path) and not hits(self.exclude_modules, path)


def matching(patterns: dict[str, Any], path: str) -> dict[str, Any]:
    return {key: value for key, value in patterns.items() if re.match(at_the_end(key), path)}


def at_the_end(pattern: str) -> str:
    """PEFT's rule: a key matches the whole path or, from a dot on, its end."""
    return rf"(.*\.)?({pattern})$"


def hits(modules: Modules, path: str) -> bool:
    if isinstance(modules, list):
        return any(path == name or path.endswith(f".{name}") for name in modules)
    return modules is not None and modules != "all-linear" and re.fullmatch(modules, path) is not None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_alpha(value: Any) -> bool:
    return is_number(value) and 0 < value < float("inf")


def is_pattern(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        value is None
        or (isinstance(value, dict) and all(is_regex(at_the_end(k)) and check(v) for k, v in value.items()))
    )


def is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def is_modules(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return value is None or (isinstance(value, str) and is_regex(value))


# Field: its default in PEFT, what it may be, and that in words.
READ: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "peft_type": (None, lambda v: v == "LORA", "LORA"),
    "r": (8, is_rank, "a positive integer"),
    "lora_alpha": (8, is_alpha, "a positive number"),
    "lora_dropout": (0.0, lambda v: is_number(v) and 0 <= v < 1, "a number from 0 up to, but not including, 1"),
    "use_rslora": (False, lambda v: isinstance(v, bool), "true or false"),
    "rank_pattern": (None, is_pattern(is_rank), "a mapping of regular expressions to positive integers"),
    "alpha_pattern": (None, is_pattern(is_alpha), "a mapping of regular expressions to positive numbers"),
    "target_modules": (None, is_modules, "a list of names or a regular expression"),
    "exclude_modules": (None, is_modules, "a list of names or a regular expression"),
    "bias": ("none", lambda v: v == "none", "none"),
    # The others (PiSSA, OLoRA, LoftQ, CorDA …) have changed the base's weights too.
    "init_lora_weights": (
        True,
        lambda v: v in (True, False, "gaussian", "eva", "orthogonal", "mica"),
        "true, false, gaussian, eva, orthogonal or mica",
    ),
}

# Fields that do not change what is computed here. Which sites there are is seen from the tensors, so the layers'
# numbers need no reading; fan_in_fan_out is seen from the module.
NEUTRAL = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    *("fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config"),
}


def read_config(folder: Path) -> PeftLoRA:
    """Raises RefusedError naming the file, and the field, where it is missing, damaged, or not plain LoRA."""
    file = folder / CONFIG
    if not file.is_file():
        raise RefusedError(f"{folder}: no {CONFIG} there, so it is not a PEFT adapter's folder.")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise RefusedError(f"{file}: cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise RefusedError(f"{file}: holds a {type(fields).__name__}, not a configuration.")
    for name, value in fields.items():
        if name not in READ and name not in NEUTRAL and value not in (None, False, "", [], {}):
            raise RefusedError(f"{file}: {name}: {json.dumps(value)[:80]} is not supported; plain LoRA only.")
    found = {name: fields.get(name, default) for name, (default, _, _) in READ.items()}
    for name, (_, allowed, words) in READ.items():
        if not allowed(found[name]):
            raise RefusedError(f"{file}: {name}: {json.dumps(found[name])[:80]} is not supported; {words}.")
    chosen_by_layer = fields.get("layers_to_transform") is not None
    return PeftLoRA(
        file=file,
        r=found["r"],
        alpha=found["lora_alpha"],
        dropout=found["lora_dropout"],
        rslora=found["use_rslora"],
        rank_pattern=found["rank_pattern"] or {},
        alpha_pattern=found["alpha_pattern"] or {},
        target_modules=None if chosen_by_layer else found["target_modules"],
        exclude_modules=found["exclude_modules"],
    )
