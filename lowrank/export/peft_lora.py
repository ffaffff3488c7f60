"""PEFT's LORA: LoRA and DoRA, and whatever else adds B A x to a layer's output, as a LoRA of its factors. ADALORA."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, shape
from lowrank.adapters.methods.adalora import AdaLoRA
from lowrank.adapters.methods.dora import DoRA
from lowrank.adapters.methods.loha import LoHa
from lowrank.adapters.methods.lokr import LoKr
from lowrank.adapters.methods.lora import LoRA
from lowrank.adapters.methods.vera import VeRA
from lowrank.adapters.sites import site_kind
from lowrank.errors import ConfigError, RefusedError
from lowrank.export.peft_config import (
    ALPHAS,
    DROPOUT,
    NO_BIAS,
    RANKS,
    TARGETS,
    Config,
    Field,
    count,
    flag,
    is_flag,
    size,
)
from lowrank.export.peft_format import Folder, Format, Site, Tensors, dropout, several, transposed, usual
from lowrank.quant.nf4 import NF4Linear

LINEAR, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
LORA_NEUTRAL = frozenset({"megatron_core", "qalora_group_size", "eva_config"})
# Starts that leave the base alone, and those whose change of the base is found again from it. What PEFT's others have
# changed in it the folder does not tell (PiSSA by a random sketch, LoftQ, CorDA …).
DRAWN, FROM_WEIGHT = (True, False, "gaussian", "eva", "orthogonal", "mica"), ("pissa", "olora")
KNOWN = (LoRA, AdaLoRA, VeRA, LoHa, LoKr)  # whose factors are known to be all that they compute


class LoRAFormat(Format):
    """A (r, in) and B (out, r) at each site, of an embedding A (r, V) and B (d, r), and DoRA's magnitude (out,).

    Written, a site's scale is folded into its B and its ``lora_alpha`` is its rank, so that sites of any rank, alpha
    and scaling stand in one folder. Where the start took s·B0 A0 out of the base (PiSSA, OLoRA), the same change of
    the base as it was is the LoRA of A above A0 and s·B beside −s·B0.
    """

    peft_type = "LORA"
    methods = (LoRA, DoRA)
    names: ClassVar = {
        "lora_A.weight": "A",
        "lora_B.weight": "B",
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
        "lora_magnitude_vector": "magnitude",
    }
    reads: ClassVar = {
        **TARGETS,
        "r": count(8),
        "lora_alpha": size(8),
        "lora_dropout": DROPOUT,
        "use_rslora": flag(False),
        "use_dora": flag(False),
        "rank_pattern": RANKS,
        "alpha_pattern": ALPHAS,
        "bias": NO_BIAS,
        "init_lora_weights": Field(
            True,
            lambda v: v in (*DRAWN, *FROM_WEIGHT),
            f"one of {', '.join(map(json.dumps, (*DRAWN, *FROM_WEIGHT)))}",
        ),
    }
    neutral = LORA_NEUTRAL

    def why_not(self, sites: Sequence[Site]) -> str | None:
        whole = all(type(site.adapter) is DoRA for site in sites)
        return next((why for site in sites if (why := not_lora(site, whole)) is not None), None)

    def fields(self, sites: Sequence[Site], written: Mapping[str, Tensors]) -> dict[str, Any]:
        r, others = usual({path: len(next(iter(tensors.values()))) for path, tensors in written.items()})
        return {
            "r": r,
            "lora_alpha": r,
            "rank_pattern": others,
            "alpha_pattern": others,
            "use_rslora": False,
            "lora_dropout": dropout(sites),
            "fan_in_fan_out": transposed(sites),
            "bias": "none",
            "init_lora_weights": True,
            "modules_to_save": None,
            "use_dora": type(sites[0].adapter) is DoRA,
        }

    def tensors(self, adapter: Any, base: nn.Module) -> Tensors:
        names = EMBEDDING if isinstance(base, nn.Embedding) else LINEAR
        found = dict(zip(names, folded(adapter), strict=True))
        return found | ({"lora_magnitude_vector": adapter.magnitude.detach()} if type(adapter) is DoRA else {})

    def method(self, config: Config) -> type[Adapter]:
        return DoRA if config["use_dora"] else LoRA

    def options(self, folder: Folder, path: str, base: nn.Module) -> dict[str, Any]:
        refuse_scaled_embedding(path, base)
        config, names = folder.config, EMBEDDING if isinstance(base, nn.Embedding) else LINEAR
        (r, into), (out, columns) = ([folder.dimension(path, name, axis) for axis in (0, 1)] for name in names)
        if r != columns:
            raise RefusedError(
                f"{folder.file}: {path}: A {(r, into)} and B {(out, columns)} are no factors of one matrix."
            )
        if (out, into) != shape(base):
            raise ConfigError(
                f"{folder.file}: {path} is made for a weight {(out, into)} (out, in); this model's is {shape(base)}."
            )
        config.check_rank(path, r)
        init, alpha = config["init_lora_weights"], config.at(path, "lora_alpha", "alpha_pattern")
        if init in FROM_WEIGHT and (config["use_dora"] or isinstance(base, nn.Embedding)):
            raise config.refusal("init_lora_weights", "not with DoRA or on an embedding")
        start = {"init": init} if init in FROM_WEIGHT else {}
        return {"r": r, "alpha": alpha, "dropout": config["lora_dropout"], "rslora": config["use_rslora"], **start}

    def shapes(self, folder: Folder, path: str, adapter: Any, base: nn.Module) -> dict[str, tuple[int, ...]]:
        names, (out, into) = EMBEDDING if isinstance(base, nn.Embedding) else LINEAR, shape(base)
        magnitude = {"lora_magnitude_vector": (out,)} if type(adapter) is DoRA else {}
        return {names[0]: (adapter.r, into), names[1]: (out, adapter.r), **magnitude}


class AdaLoRAFormat(Format):
    """A (r, in), E (r, 1), B (out, r), r = init_r; PEFT divides alpha by init_r + 1e-5, which E makes good.

    PEFT writes the triplets alone that ``rank_pattern`` keeps. The others have E = 0 here, and their A and B start as
    in a new adapter. How the budget falls is PEFT's business there and this package's here; it is not carried over.
    """

    peft_type = "ADALORA"
    methods = (AdaLoRA,)
    names: ClassVar = {"lora_A": "A", "lora_E": "E", "lora_B": "B"}
    reads: ClassVar = {
        **TARGETS,
        "init_r": count(12),
        "target_r": count(8),
        "lora_alpha": size(8),
        "lora_dropout": DROPOUT,
        "rank_pattern": Field(
            None,
            lambda v: (
                v is None
                or (isinstance(v, dict) and all(isinstance(k, list) and all(map(is_flag, k)) for k in v.values()))
            ),
            "a mapping of names of lora_E to lists of true and false",
        ),
        "bias": NO_BIAS,
        "init_lora_weights": flag(True),
    }
    neutral = LORA_NEUTRAL | {"r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}

    def why_not(self, sites: Sequence[Site]) -> str | None:
        return several(sites, {"init_r": "init_r", "alpha": "lora_alpha"})

    def fields(self, sites: Sequence[Site], written: Mapping[str, Tensors]) -> dict[str, Any]:
        one = sites[0]
        return {
            "init_r": one.option("init_r"),
            "target_r": one.option("target_r"),
            "lora_alpha": one.option("alpha"),
            "lora_dropout": dropout(sites),
            "beta1": one.option("beta1"),
            "beta2": one.option("beta2"),
            "total_step": 1,  # PEFT wants one, also of an adapter that is trained
            "rank_pattern": None,
            "fan_in_fan_out": transposed(sites),
            "bias": "none",
        }

    def tensors(self, adapter: Any, base: nn.Module) -> Tensors:
        E = (adapter.E.detach().double() * self.surplus(adapter)).to(adapter.E.dtype)
        return {"lora_A": adapter.A.detach(), "lora_E": E[:, None], "lora_B": adapter.B.detach()}

    def surplus(self, adapter: Any) -> float:
        """init_r + 1e-5, over init_r."""
        return 1 + 1e-5 / adapter.init_r

    def options(self, folder: Folder, path: str, base: nn.Module) -> dict[str, Any]:
        config = folder.config
        return {
            "init_r": config["init_r"],
            "target_r": min(config["target_r"], config["init_r"]),
            "alpha": config["lora_alpha"],
            "dropout": config["lora_dropout"],
        }

    def kept(self, config: Config, path: str) -> list[bool] | None:
        """Which of the init_r triplets the file has; None where it has all."""
        found: list[bool] | None = (config["rank_pattern"] or {}).get(f"{path}.lora_E")
        if found is not None and len(found) != config["init_r"]:
            says = f"{len(found)} triplets of {path}, and init_r is {config['init_r']}"
            raise RefusedError(f"{config.file}: rank_pattern: {says}.")
        return found

    def shapes(self, folder: Folder, path: str, adapter: Any, base: nn.Module) -> dict[str, tuple[int, ...]]:
        kept, (out, into) = self.kept(folder.config, path), shape(base)
        r = adapter.init_r if kept is None else sum(kept)
        return {"lora_A": (r, into), "lora_E": (r, 1), "lora_B": (out, r)}

    def state(self, folder: Folder, path: str, adapter: Any) -> Tensors:
        found, r = folder.sites[path], adapter.init_r
        kept = torch.tensor(self.kept(folder.config, path) or [True] * r)  # (r,)
        wide = torch.promote_types(found["lora_E"].dtype, torch.float32)
        A, B = (parameter.detach().to("cpu", wide, copy=True) for parameter in (adapter.A, adapter.B))
        E = torch.zeros(r, dtype=wide)
        A[kept], B[:, kept] = found["lora_A"].to(wide), found["lora_B"].to(wide)
        E[kept] = (found["lora_E"][:, 0].double() / self.surplus(adapter)).to(wide)
        return {"A": A, "E": E, "B": B}


def folded(adapter: Any) -> tuple[Tensor, Tensor]:
    """A and B with the scale in B, of the change to the base as it was."""
    if type(adapter) not in LoRAFormat.methods:
        A, B = adapter.factors()
        return A.detach(), B.detach()
    A, B = adapter.A.detach(), adapter.scale * adapter.B.detach().double()
    if adapter.A0 is not None:
        A = torch.cat([A, adapter.A0])  # (2r, in)
        B = torch.cat([B, -adapter.scale * adapter.B0.double()], dim=1)  # (out, 2r)
    return A, B.to(A.dtype)


def not_lora(site: Site, dora: bool) -> str | None:
    """Why a site is no LoRA, or (where all are) no DoRA."""
    path, method = site.path, type(site.adapter).__name__
    if not dora and site.adapter.factors() is None:
        return f"{path} carries {method}, which is no LoRA"
    if site_kind(site.base) == "other":
        return f"{path} carries {method}, and is no linear layer or embedding, which alone PEFT's LoRA adapts"
    if getattr(site.base, "embed_scale", None) is not None:
        return scaled_embedding(path, site.base)
    if dora:
        return None
    if site.moved and type(site.adapter) is not LoRA:
        return f"{path} carries {method}, whose start changed the base"
    if site.moved and isinstance(site.base, NF4Linear):
        return (
            f"the start of {path} (init={site.adapter.init}) changed the base and quantised the rest of it anew, so "
            f"there is no LoRA that does the same to the base as it was"
        )
    if not computes_factors(site):
        return f"{path} carries {method}, which does not compute what its factors() say"
    return None


@torch.no_grad()
def computes_factors(site: Site) -> bool:
    """Whether the call is base(x) + B A x; of a method that we do not know, on a few inputs."""
    if type(site.adapter) in KNOWN or site_kind(site.base) == "other":
        return type(site.adapter) in KNOWN
    adapter, base, generator = copy.deepcopy(site.adapter).eval(), site.base, torch.Generator().manual_seed(0)
    A, B = adapter.factors()
    weight = next((p for p in base.parameters() if p.is_floating_point()), A)
    into = shape(base)[1]
    if isinstance(base, nn.Embedding):
        x = torch.randint(0, into, (1, 4), generator=generator).to(weight.device)
        change = nn.functional.embedding(x, A.T) @ B.T
    else:
        x = torch.randn(1, 4, into, generator=generator).to(weight)
        change = x.to(A.dtype) @ A.T @ B.T  # (1, 4, out)
    plain = base(x)
    off, eps = (adapter(base, x) - plain - change.to(plain.dtype)).norm(), torch.finfo(plain.dtype).eps
    return bool(off <= max(1e-4, 8 * eps) * change.norm() + 8 * eps * plain.norm())


def refuse_scaled_embedding(path: str, base: nn.Module) -> None:
    if getattr(base, "embed_scale", None) is not None:
        raise ConfigError(f"{scaled_embedding(path, base)}.")


def scaled_embedding(path: str, base: nn.Module) -> str:
    return f"{path}: a {type(base).__name__} scales its output, and PEFT scales the adapter's with it; here it is not"
