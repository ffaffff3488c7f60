"""An adapter as a folder: ``adapter.safetensors`` (by the bare model's names) and ``adapter.json`` (the plan)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lowrank.adapters.bank import which
from lowrank.adapters.expected import expected, header, refuse_other
from lowrank.adapters.inject import adapter_state, apply, current_plan, fill
from lowrank.adapters.plan import InjectionPlan, class_and_options, is_ours, resolve
from lowrank.adapters.rank import on_original_base
from lowrank.errors import ConfigError, RefusedError
from lowrank.foreign import inside, read_json

Model = TypeVar("Model", bound=nn.Module)

TENSORS, PLAN = "adapter.safetensors", "adapter.json"


def save_adapter(model: nn.Module, folder: str | Path, name: str | None = None, **about: Any) -> Path:
    """Writes what trains in ``model`` to ``folder`` (made where it is missing); ``about`` goes into the JSON.

    Of several adapters on the model one is written, ``name``, as it would be if it stood there alone. Raises
    ConfigError where there is none of that name, no name and several, or none at all.
    """
    name = which(model, name)
    plan = current_plan(model, name)
    if not plan.rows:
        raise ConfigError(f"{folder}: nothing to save; the model carries no adapter.")
    return write(folder, plan, adapter_state(model, name), about)


def write(folder: str | Path, plan: InjectionPlan, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """The two files of an adapter's folder.

    Both carry the hash of the values, so that a crash between the two can leave no mix that would load.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    pair = hash_of(held)
    text = json.dumps({"format": 1, **about, "pair": pair, "plan": plan.to_dict()}, indent=1, ensure_ascii=False)
    one = {"pair": pair}  # safetensors writes several entries in any order, and equal adapters are equal files
    contents = {TENSORS: save(held, metadata=one), PLAN: text.encode()}
    for name, content in contents.items():
        staged(folder, name).write_bytes(content)
    for name in contents:
        os.replace(staged(folder, name), folder / name)
    return folder


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Of names and values."""
    return hashlib.sha256(save(dict(tensors))).hexdigest()


def staged(folder: Path, name: str) -> Path:
    return folder / f".{name}.{os.getpid()}"


def load_adapter(model: Model, folder: str | Path, name: str | None = None, *, foreign: bool = False) -> Model:
    """Puts the adapter of ``folder`` on a bare ``model``, in place; returns it.

    With a ``name`` it stands beside others that have one, and is one of those that ``lowrank.use`` switches: the
    first is in use at once, a later one changes nothing before it is used, and an adapter that was there without a
    name is "default" from then on. One whose start changed the base (PiSSA) is put there as the LoRA of twice the
    rank that does the same to the base as it was.

    A folder is data and runs no code: one whose plan names a class that is not lowrank's own is refused, because to
    import a module is to run it. ``foreign=True`` says that you know the class; it is then imported from your own path.

    Raises RefusedError, with the model unchanged and no memory taken, where a file is missing, damaged or of other
    names and shapes than the plan makes on this model, and ConfigError where the model is not the one that the plan
    was made for, or the name is taken.
    """
    folder = Path(folder)
    about = read_about(folder)
    plan = read_plan(folder / PLAN, about, foreign)
    try:
        wanted = expected(model, plan)
    except RefusedError as error:
        raise RefusedError(f"{folder / PLAN}: {error}") from error
    tensors = read_tensors(folder, about, wanted)
    try:
        if name is not None:
            plan, tensors = on_original_base(plan, tensors)
        return apply(model, plan, state=tensors, name=name)
    except RefusedError as error:
        raise RefusedError(f"{folder / TENSORS}: {error}") from None


def read(folder: Path, wanted: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The two files of an adapter's folder; tensors of other names and shapes than ``wanted`` are refused unread."""
    about = read_about(folder)
    return about, read_tensors(folder, about, wanted)


def read_about(folder: Path) -> dict[str, Any]:
    """What ``adapter.json`` says. Raises RefusedError naming the file."""
    for name in (PLAN, TENSORS):
        if not (folder / name).exists():
            raise RefusedError(f"{folder}: no {name} there, so it is not an adapter's folder.")
    return read_json(folder, PLAN)


def read_tensors(folder: Path, about: Mapping[str, Any], wanted: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    path = inside(folder, TENSORS)
    held = header(path)
    if wanted is not None:
        try:
            refuse_other(wanted, held)
        except RefusedError as error:
            raise RefusedError(f"{folder / TENSORS}: {error}") from None
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            pair = (file.metadata() or {}).get("pair")
    except (ValueError, RuntimeError, SafetensorError, OSError) as error:
        raise RefusedError(f"{folder / TENSORS}: cannot be read: {error}.") from error
    if pair is not None and pair != about.get("pair", pair):
        raise RefusedError(f"{folder}: {PLAN} and {TENSORS} were not saved together.")
    if pair is not None and pair != hash_of(tensors):
        raise RefusedError(f"{folder / TENSORS}: damaged; its values are not those that were saved.")
    return tensors


def read_plan(path: Path, about: Mapping[str, Any], foreign: bool = False) -> InjectionPlan:
    """Raises RefusedError where it is none, or names a class that is not lowrank's own and not allowed by ``foreign``:
    nothing is imported then."""
    try:
        plan = InjectionPlan.from_dict(about["plan"])
        if not plan.rows:
            raise TypeError("it has no rows")
        for row in plan.rows:
            if not (foreign or is_ours(row.adapter)):
                raise RefusedError(
                    f"{path}: names the class {row.adapter[:200]}, which is not lowrank's own, and to import it would "
                    f"run its module. If you know it: load_adapter(model, folder, foreign=True)."
                )
        for row in {(row.adapter, *row.options): row for row in plan.rows}.values():
            class_and_options(partial(resolve(row.adapter), **row.options))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise RefusedError(f"{path}: not the plan of an adapter ({error}).") from error
    return plan


def load_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies ``tensors`` into what trains in ``model``; every name and shape must be met, or nothing is copied."""
    fill(adapter_state(model), tensors)
