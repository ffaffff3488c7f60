"""PEFT's types of the other methods that adapt layers, one class each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from lowrank.adapters.base import shape
from lowrank.adapters.methods.ia3 import IA3
from lowrank.adapters.methods.loha import LoHa
from lowrank.adapters.methods.lokr import LoKr
from lowrank.adapters.methods.oft import OFT
from lowrank.adapters.methods.vera import VeRA
from lowrank.errors import RefusedError
from lowrank.export.peft_config import (
    ALPHAS,
    DROPOUT,
    MODULES,
    NO_BIAS,
    RANKS,
    TARGETS,
    Field,
    count,
    flag,
    is_count,
    size,
)
from lowrank.export.peft_format import Folder, Format, Site, Tensors, dropout, on_conv1d, several, transposed, usual


class VeRAFormat(Format):
    """d (r,) and b (out,) at each site; the A and B of all sites stand once, or are drawn anew from a key."""

    peft_type = "VERA"
    methods = (VeRA,)
    names: ClassVar = {"vera_lambda_d": "d", "vera_lambda_b": "b"}
    apart: ClassVar = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
    reads: ClassVar = {
        **TARGETS,
        "r": count(256),
        "d_initial": Field(0.1, size(0.1).allowed, "a positive number"),
        "vera_dropout": DROPOUT,
        "save_projection": flag(True),
        "projection_prng_key": Field(0, lambda v: is_count(v) or v == 0, "an integer from 0"),
        "bias": NO_BIAS,
    }

    def why_not(self, sites: Sequence[Site]) -> str | None:
        if len({id(site.adapter.A) for site in sites}) > 1:
            return "there are rules with an A and a B of their own, and PEFT's VeRA has one pair for all sites"
        return None

    def fields(self, sites: Sequence[Site], written: Mapping[str, Tensors]) -> dict[str, Any]:
        return {
            "r": sites[0].adapter.r,
            "d_initial": sites[0].option("d_initial"),
            "vera_dropout": dropout(sites),
            "save_projection": True,
            "fan_in_fan_out": transposed(sites),
            "bias": "none",
        }

    def options(self, folder: Folder, path: str, base: nn.Module) -> dict[str, Any]:
        config = folder.config
        return {"r": config["r"], "d_initial": config["d_initial"], "dropout": config["vera_dropout"]}

    def shapes_apart(self, folder: Folder, adapter: Any) -> dict[str, tuple[int, ...]]:
        return super().shapes_apart(folder, adapter) if folder.config["save_projection"] else {}

    def state(self, folder: Folder, path: str, adapter: Any) -> Tensors:
        found = super().state(folder, path, adapter)
        if folder.config["save_projection"]:
            return found
        (out, r), into = adapter.B.shape, adapter.A.shape[1]
        generator = torch.Generator().manual_seed(folder.config["projection_prng_key"])
        drawn = VeRA.shared({"": (out, into)}, generator=generator, r=r)
        return found | {"A": drawn["shared_A"].detach(), "B": drawn["shared_B"].detach()}


class IA3Format(Format):
    """l as (out, 1), or as (1, in) at the sites that ``feedforward_modules`` names."""

    peft_type = "IA3"
    methods = (IA3,)
    names: ClassVar = {"ia3_l": "scale"}
    reads: ClassVar = {**TARGETS, "feedforward_modules": MODULES}
    neutral = frozenset({"init_ia3_weights"})

    def fields(self, sites: Sequence[Site], written: Mapping[str, Tensors]) -> dict[str, Any]:
        inputs = [site.path for site in sites if site.adapter.feedforward]
        outputs = [site.path for site in sites if not site.adapter.feedforward]
        clash = any(path.endswith(tuple(inputs)) for path in outputs)  # PEFT takes a listed path for any end
        return {
            "feedforward_modules": "|".join(map(re.escape, inputs)) if clash else inputs,
            "fan_in_fan_out": transposed(sites),
        }

    def tensors(self, adapter: Any, base: nn.Module) -> Tensors:
        scale = adapter.scale.detach()
        return {"ia3_l": scale[None] if adapter.feedforward else scale[:, None]}

    def options(self, folder: Folder, path: str, base: nn.Module) -> dict[str, Any]:
        rows, columns = (folder.dimension(path, "ia3_l", axis) for axis in (0, 1))
        named = folder.config["feedforward_modules"]
        if named is None:  # PEFT knows them by the architecture; the tensor shows it
            return {"feedforward": rows == 1 and columns == shape(base)[1]}
        if isinstance(named, str):
            return {"feedforward": re.fullmatch(named, path) is not None}
        return {"feedforward": path.endswith(tuple(named))}


class LoHaFormat(Format):
    """B₁, A₁, B₂, A₂ as they are, and r and alpha by site."""

    peft_type = "LOHA"
    methods = (LoHa,)
    names: ClassVar = {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}
    reads: ClassVar = {**TARGETS, "r": count(8), "alpha": size(8), "rank_pattern": RANKS, "alpha_pattern": ALPHAS}
    neutral = frozenset({"use_effective_conv2d"})

    def why_not(self, sites: Sequence[Site]) -> str | None:
        return on_conv1d(sites, "LoHa")

    def fields(self, sites: Sequence[Site], written: Mapping[str, Tensors]) -> dict[str, Any]:
        r, ranks = usual({site.path: site.option("r") for site in sites})
        alpha, alphas = usual({site.path: site.option("alpha") for site in sites})
        return {"r": r, "alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas}

    def options(self, folder: Folder, path: str, base: nn.Module) -> dict[str, Any]:
        r = folder.dimension(path, "hada_w1_b", 0)
        folder.config.check_rank(path, r)
        return {"r": r, "alpha": folder.config.at(path, "alpha", "alpha_pattern")}


class LoKrFormat(Format):
    """C as w1; D as w2, or its factors B and A as w2_a and w2_b; r and alpha by site, one factor for all."""

    peft_type = "LOKR"
    methods = (LoKr,)
    names: ClassVar = {"lokr_w1": "C", "lokr_w2": "D", "lokr_w2_a": "B", "lokr_w2_b": "A"}
    reads: ClassVar = {
        **LoHaFormat.reads,
        "decompose_both": Field(False, lambda v: v is False, "false"),
        "decompose_factor": Field(-1, lambda v: is_count(v) or v == -1, "-1 or a positive integer"),
    }
    neutral = frozenset({"use_effective_conv2d"})

    def why_not(self, sites: Sequence[Site]) -> str | None:
        return on_conv1d(sites, "LoKr") or several(sites, {"factor": "decompose_factor"})

    def fields(self, sites: Sequence[Site], written: Mapping[str, Tensors]) -> dict[str, Any]:
        factor = sites[0].option("factor")
        return LoHaFormat().fields(sites, written) | {"decompose_factor": -1 if factor is None else factor}

    def options(self, folder: Folder, path: str, base: nn.Module) -> dict[str, Any]:
        config, factor = folder.config, folder.config["decompose_factor"]
        return {
            "r": config.at(path, "r", "rank_pattern"),
            "alpha": config.at(path, "alpha", "alpha_pattern"),
            "factor": None if factor == -1 else factor,
        }


class OFTFormat(Format):
    """R's entries as they are. PEFT's two forms of Cayley turn opposite ways, so the flag goes with them."""

    peft_type = "OFT"
    methods = (OFT,)
    names: ClassVar = {"oft_R.weight": "R"}
    reads: ClassVar = {
        **TARGETS,
        "use_cayley_neumann": flag(True),
        "num_cayley_neumann_terms": Field(5, lambda v: is_count(v) and v >= 3, "3 or more"),
        "r": Field(0, lambda v: is_count(v) or v == 0, "an integer from 0"),
        "oft_block_size": Field(32, lambda v: is_count(v) or v == 0, "an integer from 0"),
        "peft_version": Field("0", lambda v: v is None or isinstance(v, str), "a version"),
        "bias": NO_BIAS,
    }
    neutral = frozenset({"eps"})

    def why_not(self, sites: Sequence[Site]) -> str | None:
        one = {"block_size": "oft_block_size", "neumann": "num_cayley_neumann_terms"}
        return on_conv1d(sites, "OFT") or several(sites, one)

    def fields(self, sites: Sequence[Site], written: Mapping[str, Tensors]) -> dict[str, Any]:
        adapter = sites[0].adapter
        terms = {"num_cayley_neumann_terms": adapter.neumann} if adapter.neumann else {}
        return {
            "r": 0,
            "oft_block_size": adapter.block_size,
            "use_cayley_neumann": bool(adapter.neumann),
            **terms,
            "bias": "none",
            "peft_version": "0.21.2",  # before 0.18 it was another series
        }

    def options(self, folder: Folder, path: str, base: nn.Module) -> dict[str, Any]:
        config, into = folder.config, shape(base)[1]
        block_size = into // max(folder.dimension(path, "oft_R.weight", 0), 1)
        r, promised = config["r"], config["oft_block_size"]
        if (r and into % r == 0 and into // r != block_size) or (
            not r and promised and into % promised == 0 and promised != block_size  # else PEFT takes one near it
        ):
            says = f"{r} blocks" if r else f"blocks of {promised}"
            raise RefusedError(f"{config.file}: says {says} for {path}, but its tensor has blocks of {block_size}.")
        terms = max(config["num_cayley_neumann_terms"], 4) if config["use_cayley_neumann"] else 0  # 3 is what 4 is
        version = re.match(r"(\d+)\.(\d+)", config["peft_version"] or "")
        if terms and (version is None or (int(version[1]), int(version[2])) < (0, 18)):
            raise config.refusal("peft_version", "PEFT before 0.18 computed another series with use_cayley_neumann")
        return {"block_size": block_size, "neumann": terms}
