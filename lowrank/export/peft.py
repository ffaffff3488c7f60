"""LoRA in PEFT's folder format, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``.

A site's tensors are ``base_model.model.<path>.lora_A.weight`` (r, in) and ``….lora_B.weight`` (out, r), of an
embedding ``….lora_embedding_A`` (r, V) and ``….lora_embedding_B`` (d, r); they are the same over a dense and an
NF4 base. PEFT itself is not needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.base import shape
from lowrank.adapters.inject import apply, current_plan
from lowrank.adapters.lora import LoRA
from lowrank.adapters.plan import Factory, plan
from lowrank.adapters.sites import Pattern, adapted, site_kind, sites
from lowrank.adapters.store import load_state
from lowrank.errors import ConfigError, RefusedError, nearest
from lowrank.export.peft_config import CONFIG, PeftLoRA, read_config

Model = TypeVar("Model", bound=nn.Module)

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
NAMES = {"linear": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}
FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)")
BASE_COPY = re.compile(rf"{re.escape(PREFIX)}(.+?)(?:\.base_layer)?\.weight")

Factors = dict[str, dict[str, Tensor]]  # site's path → {"A": (r, in), "B": (out, r)}


def export_peft(model: nn.Module, folder: str | Path, base_name: str | None = None) -> Path:
    """Writes the LoRA of ``model`` as a folder that ``peft.PeftModel.from_pretrained(base, folder)`` reads.

    Each site's scale is folded into its B and its ``lora_alpha`` is its rank, so that sites of any rank, alpha and
    scaling stand in one folder. ``base_name`` is what PEFT calls the base (else the model's own name or path).
    Files of other names in ``folder`` are left alone. Raises ConfigError, with nothing written, where the model
    carries no adapter or something that is not LoRA.
    """
    carried = exportable(model)
    tensors = {}
    for path, module in carried.items():
        name_A, name_B = (f"{PREFIX}{path}.{name}" for name in NAMES[site_kind(module.base)])
        A, B = module.adapter.A.detach(), module.adapter.B.detach()
        tensors[name_A] = A.cpu().contiguous()
        tensors[name_B] = (module.adapter.scale * B.double()).to(B.dtype).cpu().contiguous()
    folder = Path(folder)
    write(folder, tensors, peft_config(model, carried, base_name))
    return folder


def exportable(model: nn.Module) -> dict[str, Any]:
    """The wrapped sites by path, all of them plain LoRA."""
    rows = current_plan(model).rows
    carried = dict(adapted(model))
    for row in rows:
        if row.path not in carried or type(carried[row.path].adapter) is not LoRA:
            raise ConfigError(
                f"export: PEFT's format is written for LoRA only; {row.path} carries {row.method}. "
                f"`lowrank merge` writes the whole model instead."
            )
        refuse_scaled_embedding(row.path, carried[row.path].base)
    if not rows:
        raise ConfigError("export: the model carries no adapter.")
    return carried


def peft_config(model: nn.Module, carried: dict[str, Any], base_name: str | None) -> dict[str, Any]:
    ranks = {path: module.adapter.r for path, module in carried.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != usual}
    dropouts = {module.adapter.dropout for module in carried.values()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": base_name or getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "target_modules": target_modules(model, list(carried)),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,  # PEFT has one for all sites
        "fan_in_fan_out": any(isinstance(module.base, Conv1D) for module in carried.values()),
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def target_modules(model: nn.Module, paths: list[str]) -> list[str] | str:
    """The paths; as one regular expression where PEFT, which takes a listed path for the end of longer ones too,
    would find another module by one of them."""
    endings = tuple(f".{path}" for path in paths)
    if any(other.endswith(endings) for other, _ in sites(model) if other not in paths):
        return "|".join(re.escape(path) for path in paths)
    return paths


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Both files whole, or neither: an older pair's configuration goes first and the new one comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".staging-peft-{os.getpid()}"
    staging.mkdir()
    try:
        save_file(tensors, staging / TENSORS, metadata={"format": "pt"})
        (staging / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / CONFIG).unlink(missing_ok=True)
        for name in (TENSORS, CONFIG):
            (staging / name).replace(folder / name)
    finally:
        shutil.rmtree(staging)


def import_peft(model: Model, folder: str | Path, name: str | None = None) -> Model:
    """Puts the LoRA of a PEFT folder on a bare ``model``, in place; returns it. ``name`` is "default" or None.

    Sites, ranks and shapes come from the tensors themselves. Raises RefusedError where a file is missing, damaged,
    a pickle, or asks for something that is not plain LoRA; ConfigError where the adapter does not fit this model.
    The model is then unchanged.
    """
    if name not in (None, "default"):
        raise ConfigError(f"import: name: '{name}' is not allowed; a model takes one adapter, 'default'.")
    folder = Path(folder)
    config, tensors = read_config(folder), read_tensors(folder)
    factors, copies = sort_keys(folder / TENSORS, tensors)
    fits(folder / TENSORS, model, factors)
    refuse_other_base(folder / TENSORS, model, copies)
    refuse_missing_sites(folder / TENSORS, model, config, factors)
    apply(model, plan(model, rules(config, factors)))
    fill(model, factors)
    return model


def rules(config: PeftLoRA, factors: Factors) -> dict[Pattern, Factory]:
    """A rule for all sites of one rank and alpha."""
    paths: dict[tuple[int, float], list[str]] = {}
    for path, pair in factors.items():
        r = pair["A"].shape[0]
        config.check_rank(path, r)
        paths.setdefault((r, config.alpha_of(path)), []).append(path)
    return {
        f"re:{'|'.join(map(re.escape, group))}": partial(
            LoRA, r=r, alpha=alpha, dropout=config.dropout, rslora=config.rslora
        )
        for (r, alpha), group in paths.items()
    }


def fill(model: nn.Module, factors: Factors) -> None:
    """fp64 values stay fp64; everything narrower becomes fp32, exactly."""
    for path, module in adapted(model):
        module.adapter.to(torch.promote_types(factors[path]["A"].dtype, torch.float32))
    load_state(model, {f"{path}.adapter.{name}": t for path, pair in factors.items() for name, t in pair.items()})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / TENSORS
    if not file.is_file():
        if (folder / PICKLE).is_file():
            raise RefusedError(
                f"{folder / PICKLE}: a pickle can run any code when it is read, so it is not read here. "
                f"Save the adapter with PEFT again: it writes {TENSORS}."
            )
        raise RefusedError(f"{folder}: no {TENSORS} there.")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise RefusedError(f"{file}: cannot be read: {error}") from error


def sort_keys(file: Path, tensors: dict[str, Tensor]) -> tuple[Factors, dict[str, Tensor]]:
    """LoRA's factors by site, and the copies of base weights that PEFT saves beside an adapted embedding or head."""
    factors: Factors = {}
    copies = {}
    for key, tensor in tensors.items():
        if match := FACTOR.fullmatch(key):
            factors.setdefault(match[1], {})[match[3]] = tensor
        elif "lora_" not in key and (match := BASE_COPY.fullmatch(key)):
            copies[match[1]] = tensor
        else:
            raise RefusedError(f"{file}: {key} is not part of a LoRA.")
    for path, pair in factors.items():
        if pair.keys() != {"A", "B"}:
            raise RefusedError(f"{file}: {path} has lora_{next(iter(pair))} alone.")
    if not factors:
        raise RefusedError(f"{file}: holds no LoRA.")
    return factors, copies


def fits(file: Path, model: nn.Module, factors: Factors) -> None:
    """Every site is there, of a kind that LoRA takes and of the shape that its factors have."""
    here = {path: module for path, module in sites(model) if site_kind(module) != "other"}
    unknown = [path for path in factors if path not in here]
    if unknown:
        close = nearest(unknown[0], here)
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConfigError(
            f"{file}: {unknown[0]}{more}: no such linear layer or embedding in this {type(model).__name__}."
            + (f" Nearest: '{close}'." if close else "")
        )
    for path, pair in factors.items():
        A, B = pair["A"], pair["B"]
        if not (A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] and A.is_floating_point() and A.dtype == B.dtype):
            raise RefusedError(
                f"{file}: {path}: A {tuple(A.shape)} {A.dtype} and B {tuple(B.shape)} {B.dtype} are no factors of one "
                f"matrix."
            )
        if (B.shape[0], A.shape[1]) != shape(here[path]):
            raise ConfigError(
                f"{file}: {path} is made for a weight {(B.shape[0], A.shape[1])} (out, in); this model's is "
                f"{shape(here[path])}."
            )
        refuse_scaled_embedding(path, here[path])


def refuse_scaled_embedding(path: str, base: nn.Module) -> None:
    if getattr(base, "embed_scale", None) is not None:
        raise ConfigError(
            f"{path}: a {type(base).__name__} scales its output, and PEFT scales the adapter's with it; here it is not."
        )


def refuse_other_base(file: Path, model: nn.Module, copies: dict[str, Tensor]) -> None:
    here = dict(sites(model))
    for path, tensor in copies.items():
        weight = getattr(here.get(path), "weight", None)
        if not (isinstance(weight, Tensor) and weight.shape == tensor.shape and torch.equal(tensor.to(weight), weight)):
            raise RefusedError(
                f"{file}: holds its own {path}.weight, which is not this base's: it was resized or trained, or the "
                f"base is another one."
            )


def refuse_missing_sites(file: Path, model: nn.Module, config: PeftLoRA, factors: Factors) -> None:
    """A site that the configuration names and the file has no tensors for would silently stay as it was."""
    for path, module in sites(model):
        if path not in factors and site_kind(module) != "other" and config.targets(path):
            raise RefusedError(f"{file}: no tensors for {path}, which target_modules in {CONFIG} names.")
