"""What a run's numbers depend on, hashed or written out, so that a resume can refuse what has changed.

Paths are no part of it: where a file lies may change, what is in it may not.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lowrank import classes
from lowrank.adapters.plan import InjectionPlan, resolve
from lowrank.assemble import Data, Loaded, Parts
from lowrank.models import load as models
from lowrank.record import directory, source
from lowrank.schema import Config
from lowrank.secrets import redacted_tree
from lowrank.train.precision import DTYPES

PACKAGES = ("lowrank", "torch", "transformers", "tokenizers", "safetensors", "bitsandbytes")
# What cannot change what is trained, keys or groups: this is the place to declare another one. `checkpoint.allow`
# need not name it. Of paths and names the content counts: data, base, tokenizer, architecture.
FREE = (
    *("checkpoint", "eval", "track"),
    *("loop.max_seconds", "loop.on_nonfinite", "loop.max_skipped", "loop.trace_nonfinite", "loop.patience"),
    *("loop.prune", "loop.diverged", "loop.offload", "loop.profile"),
    *("data.path", "data.eval_path", "model.name", "model.revision"),
)
STEPS = "steps"  # all of the run's, whether loop.steps or loop.epochs says so: what an extension is seen by
LENGTH = ("loop.steps", "loop.epochs", STEPS)  # these may grow without being allowed by name
# Of these, but of nothing that trains, the untouched base's evaluation depends too.
MEASURED = (
    *("base", "architecture", "data", "tokenizer"),
    *("loop.precision", "loop.device", "machine", "fast", "threads", "versions"),
)
PROBE = "Hällo wörld!  1234\n\t中文 🙂 </s><|im_start|>"  # tells tokenizers apart beyond what their files say


def identity(parts: Parts, data: Data, loaded: Loaded, *, base: str, steps: int) -> dict[str, Any]:
    """Flat, so that differences can be told field by field; JSON values. ``base`` is the hash of the weights.

    A key whose value is ``auto`` counts as what it resolves to.
    """
    config = parts.config
    resolved = {
        "loop.precision": parts.precision,
        "loop.device": parts.device.type,
        "model.dtype": next(name for name, dtype in DTYPES.items() if dtype == parts.dtype),
    }
    settings = {name: value for name, value in {**flat(config.to_dict()), **resolved}.items() if not within(name, FREE)}
    settings = redacted_tree(settings)  # it is kept in every checkpoint
    return {
        **settings,
        "data": data.split.sha256,
        "tokenizer": tokenizer_hash(parts.tokenizer),
        "architecture": architecture_hash(config),
        "base": base,
        "plan": sha256(parts.plan.to_dict()),
        "code": source.code_hash(source.files(named_classes(config, parts.plan))),
        "fast": loaded.fast,
        "packed": loaded.packed,
        STEPS: steps,
        "threads": torch.get_num_threads(),
        "machine": machine(parts.device),
        **{f"versions.{name}": found for name, found in versions(named_classes(config, parts.plan)).items()},
    }


def names(config: Config, *identities: Mapping[str, Any]) -> list[str]:
    """Every name that ``checkpoint.allow`` may hold: keys and groups of the configuration, fields of identities."""
    fields = [*flat(config.to_dict()), *FREE, *(name for known in identities for name in known)]
    prefixes = [name.rsplit(".", n)[0] for name in fields for n in range(name.count(".") + 1)]
    ours = ("data", "tokenizer", "architecture", "base", "plan", "code", "fast", "packed", "threads", "machine")
    return list(dict.fromkeys([*prefixes, *ours, "versions"]))


def within(name: str, groups: Iterable[str]) -> bool:
    """Whether a field is one of ``groups``, or lies in one."""
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Field by field, ``0.0002 → 0.0001`` or, of hashes, ``sha256 differs``, where two identities are not equal."""
    found = {}
    for name in [*new, *(name for name in old if name not in new)]:
        both = [known.get(name, "(not set)") for known in (old, new)]
        if both[0] != both[1]:
            hashed = all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in both)
            found[name] = "sha256 differs" if hashed else " → ".join(show(value) for value in both)
    return found


def show(value: Any) -> str:
    """A value as a user writes it, in one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} → {"optim.lr": 1}, of values that JSON can hold."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = plain(value)
    return found


def plain(value: Any) -> Any:
    """As it comes back from a JSON file, in which infinity is written as in YAML."""
    if isinstance(value, float) and value == float("inf"):
        return ".inf"
    return json.loads(json.dumps(value))


def sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def named_classes(config: Config, plan: InjectionPlan) -> list[type]:
    """The classes whose code a run is: of its plan and its optimizer."""
    optimizer = classes.resolve(config.optim.target, torch.optim.Optimizer, "optim._target_")
    return [*(resolve(name) for name in sorted({row.adapter for row in plan.rows})), optimizer]


def versions(used: Iterable[type] = ()) -> dict[str, str]:
    """Of Python and the packages that compute, also of those in which the classes ``used`` are installed."""
    homes = {cls.__module__.partition(".")[0] for cls in used} - set(PACKAGES)
    known = packages_distributions() if homes else {}
    packages = dict.fromkeys([*PACKAGES, *(name for home in sorted(homes) for name in known.get(home, []))])
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(device: torch.device) -> str:
    """The machine's type: what decides which kernels compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that makes token ids of texts: vocabulary, merges, normalisation, special tokens, template."""
    backend, pieces = getattr(tokenizer, "backend_tokenizer", None), getattr(tokenizer, "sp_model", None)
    if backend is not None:
        rules = backend.to_str()
    else:
        vocabulary = {"vocabulary": tokenizer.get_vocab(), "merges": list(getattr(tokenizer, "bpe_ranks", ()))}
        rules = json.dumps(vocabulary, default=repr)
    rest = {
        "class": type(tokenizer).__name__,
        "pieces": hashlib.sha256(pieces.serialized_model_proto()).hexdigest() if pieces is not None else None,
        "added": {str(number): repr(token) for number, token in tokenizer.added_tokens_decoder.items()},
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "probe": tokenizer(PROBE).input_ids,
    }
    return rules_hash(rules, json.dumps(rest, default=repr))


@lru_cache(maxsize=2)
def rules_hash(rules: str, rest: str) -> str:
    """Of two JSON texts: to read a large vocabulary and write it again takes a fifth of a second, once."""
    told = json.loads(rules)
    left = {name: None for name in ("truncation", "padding") if name in told}  # behind by the last call
    return sha256({**json.loads(rest), "rules": told | left})


def architecture_hash(config: Config) -> str:
    """SHA-256 of the model's own config.json, but for where it lies and who wrote it; the weights' type is theirs."""
    known = models.config(config.model).to_dict()
    return sha256({k: v for k, v in known.items() if k not in ("_name_or_path", "transformers_version", "dtype")})


def recorded(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The identity and the provenance that a run directory tells; both empty where it does not."""
    told = directory.read_json(folder / directory.IDENTITY)
    found, provenance = told.get("identity"), told.get("provenance")
    return found if isinstance(found, dict) else {}, provenance if isinstance(provenance, dict) else {}
