"""PEFT's two files, written whole and read as what nobody vouches for: every tensor is accounted for."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank.adapters.expected import header
from lowrank.adapters.sites import backbone, kinds, sites
from lowrank.errors import ConfigError, RefusedError, nearest
from lowrank.export.peft_config import CONFIG, Config
from lowrank.export.peft_format import Folder, Format, Tensors
from lowrank.foreign import inside
from lowrank.secrets import redacted

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
BASE_COPY = re.compile(rf"{re.escape(PREFIX)}(.+?)(?:\.base_layer)?\.weight")
KINDS = {"linear": "linear layer", "embedding": "embedding"}


def write(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    """Both files whole, or neither: an older pair's configuration goes first and the new one comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".staging-peft-{os.getpid()}"
    staging.mkdir()
    try:
        held = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(held, staging / TENSORS, metadata={"format": "pt"})
        (staging / CONFIG).write_text(
            redacted(json.dumps(config, indent=2, ensure_ascii=False)) + "\n", encoding="utf-8"
        )
        (folder / CONFIG).unlink(missing_ok=True)
        for name in (TENSORS, CONFIG):
            (staging / name).replace(folder / name)
    finally:
        shutil.rmtree(staging)


def read(folder: Path, model: nn.Module, format: Format, config: Config) -> Folder:
    """The tensors by site, as the header describes them: no value is read. Raises RefusedError where the file is
    missing, damaged, a pickle, or holds something else, and ConfigError where the model has no such sites."""
    file = folder / TENSORS
    found = sort_keys(file, model, format, config, header(located(folder)))
    if format.names:
        refuse_unknown(file, model, format, found.sites)
        refuse_missing(file, model, format, found)
        for path, tensor in found.copies.items():
            refuse_other_base(file, model, path, tensor)
    return found


def with_values(folder: Path, model: nn.Module, format: Format, config: Config) -> Folder:
    """The same with the file's values, once they are known to be of the right shapes."""
    file = located(folder)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise RefusedError(f"{file}: cannot be read: {error}") from error
    found = sort_keys(folder / TENSORS, model, format, config, tensors)
    for path, tensor in found.copies.items():
        refuse_other_base(folder / TENSORS, model, path, tensor)
    return found


def located(folder: Path) -> Path:
    file = folder / TENSORS
    if not file.exists():
        if (folder / PICKLE).is_file():
            raise RefusedError(
                f"{folder / PICKLE}: a pickle can run any code when it is read, so it is not read here. "
                f"Save the adapter with PEFT again: it writes {TENSORS}."
            )
        raise RefusedError(f"{folder}: no {TENSORS} there.")
    return inside(folder, TENSORS)


def sort_keys(file: Path, model: nn.Module, format: Format, config: Config, tensors: Tensors) -> Folder:
    """Each tensor by what it is: of a site, of none, or the copy of a base weight."""
    part = re.compile(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(map(re.escape, format.names)) or '(?!)'})")
    found = Folder(file, config, {}, {}, {})
    bare = dict(sites(model))
    for key, tensor in tensors.items():
        if match := part.fullmatch(key):
            found.sites.setdefault(match[1], {})[match[2]] = tensor
        elif key in format.apart:
            found.apart[key] = tensor
        elif format.names and (match := BASE_COPY.fullmatch(key)) and match[1] in bare:
            found.copies[match[1]] = tensor
        else:
            raise RefusedError(f"{file}: {key} is not part of {article(format)}.")
    if format.names and not found.sites:
        raise RefusedError(f"{file}: holds no {format.name}.")
    if not format.names:
        found.sites[trunk(model)] = {}
    return found


def article(format: Format) -> str:
    return f"{'an' if format.name[0] in 'AIO' else 'a'} {format.name}"


def trunk(model: nn.Module) -> str:
    path = backbone(model)
    if path is None:
        raise ConfigError(f"import: this {type(model).__name__} has no backbone for an adapter that stands before it.")
    return path


def refuse_unknown(file: Path, model: nn.Module, format: Format, found: Mapping[str, Tensors]) -> None:
    """Every site is there, and of a kind that the method takes."""
    allowed = format.methods[0].sites
    here = [path for path, kind in kinds(model).items() if kind in allowed]
    unknown = [path for path in found if path not in here]
    if unknown:
        close = nearest(unknown[0], here)
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        what = " or ".join(KINDS.get(kind, kind) for kind in allowed)
        raise ConfigError(
            f"{file}: {unknown[0]}{more}: no such {what} in this {type(model).__name__}."
            + (f" Nearest: '{close}'." if close else "")
        )


def refuse_other_base(file: Path, model: nn.Module, path: str, copy: Tensor) -> None:
    """Of a copy without values the shape alone is compared."""
    weight = getattr(dict(sites(model))[path], "weight", None)
    same = isinstance(weight, Tensor) and weight.shape == copy.shape
    if isinstance(weight, Tensor) and same and not copy.is_meta:
        same = torch.equal(copy.to(weight), weight)
    if not same:
        raise RefusedError(
            f"{file}: holds its own {path}.weight, which is not this base's: it was resized or trained, or the "
            f"base is another one."
        )


def refuse_missing(file: Path, model: nn.Module, format: Format, found: Folder) -> None:
    """A site that the configuration names and the file has no tensors for would silently stay as it was."""
    for path, kind in kinds(model).items():
        if path not in found.sites and kind in format.methods[0].sites and found.config.targets(path):
            raise RefusedError(f"{file}: no tensors for {path}, which target_modules in {CONFIG} names.")


def refuse_misfits(folder: Folder, format: Format, adapters: Mapping[str, Any], bases: Mapping[str, nn.Module]) -> None:
    """Every tensor that an adapter has is there, in its shape, and nothing more."""
    for path, tensors in folder.sites.items():
        wanted = format.shapes(folder, path, adapters[path], bases[path])
        compare(folder.file, format, {f"{path}.{name}": tensor for name, tensor in tensors.items()}, wanted, f"{path}.")
    one = next(iter(adapters.values()))
    compare(folder.file, format, folder.apart, format.shapes_apart(folder, one))


def compare(file: Path, format: Format, found: Tensors, wanted: Mapping[str, tuple[int, ...]], where: str = "") -> None:
    names = {f"{where}{name}": size for name, size in wanted.items()}
    for name in names:
        if name not in found:
            raise RefusedError(f"{file}: {name} is missing.")
    for name, tensor in found.items():
        if name not in names:
            raise RefusedError(f"{file}: {name} is not part of {article(format)} with this {CONFIG}.")
        if not tensor.is_floating_point():
            raise RefusedError(f"{file}: {name} holds {tensor.dtype}, no numbers to compute with.")
        if tuple(tensor.shape) != names[name]:
            raise RefusedError(f"{file}: {name} has shape {tuple(tensor.shape)}, not {names[name]} as in this model.")
