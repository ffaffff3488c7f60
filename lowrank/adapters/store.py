"""An adapter as a folder: ``adapter.safetensors`` (by the bare model's names) and ``adapter.json`` (the plan)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank.adapters.inject import adapter_state, apply, current_plan
from lowrank.adapters.plan import InjectionPlan
from lowrank.errors import RefusedError

Model = TypeVar("Model", bound=nn.Module)

TENSORS, PLAN = "adapter.safetensors", "adapter.json"


def save_adapter(model: nn.Module, folder: str | Path, **about: Any) -> Path:
    """Writes what trains in ``model`` to ``folder`` (made where it is missing); ``about`` goes into the JSON."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in adapter_state(model).items()}
    plan = {"format": 1, **about, "plan": current_plan(model).to_dict()}
    write(folder / PLAN, json.dumps(plan, indent=1, ensure_ascii=False).encode())
    staged = folder / f".{TENSORS}.{os.getpid()}"
    save_file(tensors, staged, metadata={"format": "pt"})
    staged.replace(folder / TENSORS)
    return folder


def write(path: Path, content: bytes) -> None:
    """The whole file or none of it."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_bytes(content)
    staged.replace(path)


def load_adapter(model: Model, folder: str | Path) -> Model:
    """Puts the adapter of ``folder`` on a bare ``model``, in place; returns it.

    Raises RefusedError, with the model unchanged, where a file is missing or damaged, and ConfigError where
    the model is not the one that the plan was made for.
    """
    folder = Path(folder)
    about, tensors = read(folder)
    try:
        plan = InjectionPlan.from_dict(about["plan"])
    except (KeyError, TypeError) as error:
        raise RefusedError(f"{folder / PLAN}: not the plan of an adapter ({error}).") from error
    apply(model, plan)
    try:
        load_state(model, tensors)
    except RefusedError as error:
        from lowrank.adapters.inject import remove

        remove(model)
        raise RefusedError(f"{folder / TENSORS}: {error}") from None
    return model


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The two files of an adapter's folder."""
    for name in (PLAN, TENSORS):
        if not (folder / name).is_file():
            raise RefusedError(f"{folder}: no {name} there, so it is not an adapter's folder.")
    try:
        about = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        return about, load_file(folder / TENSORS)
    except (ValueError, SafetensorError, OSError) as error:
        raise RefusedError(f"{folder}: cannot be read: {error}") from error


def load_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies ``tensors`` into what trains in ``model``; every name and shape must be met, or nothing is copied."""
    state = adapter_state(model)
    missing, extra = sorted(state.keys() - tensors.keys()), sorted(tensors.keys() - state.keys())
    if missing or extra:
        name = (missing or extra)[0]
        raise RefusedError(
            f"{name} is {'missing' if missing else 'not part of the plan'} ({len(missing + extra)} such)."
        )
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise RefusedError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(state[name].shape)}.")
    for name, tensor in tensors.items():
        state[name].detach().copy_(tensor)
