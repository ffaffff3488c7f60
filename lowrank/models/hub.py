"""From a name to a folder of files: a folder as it is, else the hub's cache, else the hub.

What is at hand is used without asking the network, so that a run offline starts, or fails, at once.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download

from lowrank.errors import ConfigError, nearest

FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]  # configuration and tokenizers


def folder(name: str | None, revision: str | None = None) -> Path:
    """The local folder of model ``name``; it has a config.json, and weights unless only part was cached.

    ConfigError where the name is neither a folder nor a model that the hub (or its cache) can give.
    """
    if not name:
        raise ConfigError("model.name: needed with model=hf; a folder or a hub id such as 'gpt2'.")
    path = Path(name).expanduser()
    if path.is_dir():
        return _with_config(path)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ConfigError(_unknown(name, "not a hub id"))
    found = _cached(name, revision)
    if found is None or not (constants.is_offline_mode() or _has_weights(found)):
        found = _downloaded(name, revision)
    return _with_config(found)


def _with_config(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    hint = ""
    if (path / "adapter_config.json").is_file():
        hint = " It holds an adapter: name the model that the adapter was trained on."
    raise ConfigError(f"model.name: no config.json in '{path}': not a transformers model folder.{hint}")


def _has_weights(path: Path) -> bool:
    return any(path.glob("*.safetensors")) or any(path.glob("*.bin"))


def _cached(name: str, revision: str | None) -> Path | None:
    try:
        path = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None
    return path if (path / "config.json").is_file() else None


def _downloaded(name: str, revision: str | None) -> Path:
    if constants.is_offline_mode():
        raise ConfigError(_unknown(name, "offline"))
    try:
        path = _snapshot(name, revision, "*.safetensors")
        if not _has_weights(path):  # an older model: transformers reads these with weights_only
            path = _snapshot(name, revision, "*.bin")
    except errors.GatedRepoError as error:
        reason = "gated: accept its terms there, then 'hf auth login'"
        raise ConfigError(_unknown(name, reason)) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"model.revision: '{revision}' is no revision of '{name}'.") from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(_unknown(name, "no such model, or private: 'hf auth login'")) from error
    except errors.LocalEntryNotFoundError as error:  # how the hub's client says that nothing answered
        raise ConfigError(_unknown(name, "offline")) from error
    return path


def _snapshot(name: str, revision: str | None, weights: str) -> Path:
    """Files at the top of the repository only: folders hold other formats of the same weights."""
    return Path(
        snapshot_download(
            name, revision=revision, allow_patterns=[*FILES, weights], ignore_patterns=["*/*"], etag_timeout=5
        )
    )


def _unknown(name: str, reason: str) -> str:
    return (
        f"model.name: '{name}' is neither a folder nor reachable on the hub ({reason}).{_nearest(name)}\n"
        "Give a folder that holds config.json, weights and tokenizer, or a hub id while online; "
        "'hf download ID' beforehand makes an id work offline. model=smollm2 and model=tiny_llama need no hub."
    )


def _nearest(name: str) -> str:
    """The folder beside the named path, or the model in the hub's cache, that was probably meant."""
    path = Path(name).expanduser()
    known = {}
    if path.parent.is_dir():
        known = {str(path.parent / found.name): found for found in path.parent.glob("[!.]*") if found.is_dir()}
    cached = [found.name for found in Path(constants.HF_HUB_CACHE).glob("models--*")]
    match = nearest(str(path), [*known, *(found[8:].replace("--", "/") for found in cached)])
    return f" Did you mean '{match}'?" if match else ""
