"""The studies of docs/experiments.md: what each compares, and what the paper found, as something that can be tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SAME = 0.05  # nats a token: below it two losses are as good as each other

Keys = Mapping[str, Any]  # a run's configuration under dotted names


@dataclass(frozen=True)
class Claim:
    """``first`` has a lower loss than ``second``; with ``same``, one that differs by less than SAME."""

    says: str
    first: str
    second: str
    same: bool = False


@dataclass(frozen=True)
class Study:
    name: str  # experiment=NAME
    arm: Callable[[Keys], str]  # what a run is called in the table
    order: tuple[str, ...]  # the arms, as the paper has them
    claims: tuple[Claim, ...]


def letters(keys: Keys) -> str:
    """``[q_proj,v_proj]`` or ``{*.q_proj: …}`` → ``q, v``."""
    return ", ".join(pattern.removeprefix("*.").removesuffix("_proj") for pattern in keys["adapter.targets"])


def ranked(keys: Keys) -> str:
    return f"{letters(keys)}: r = {keys['adapter.r']}"


def quantised(keys: Keys) -> str:
    if keys["model.kind"] == "hf":
        return "FP4"  # benchmarks/fp4.py
    if keys["quant.kind"] == "none":
        return "fp32"
    return f"{keys['quant.kind'].upper()}{' + double quantisation' if keys['quant.double'] else ''}"


def scaled(keys: Keys) -> str:
    plus, square = bool(keys["optim.groups"]), keys["adapter.rslora"]
    name = {(False, False): "LoRA", (True, False): "LoRA+", (False, True): "rsLoRA", (True, True): "rsLoRA, LoRA+"}
    return f"{name[plus, square]}, r = {keys['adapter.r']}"


def spread_out(keys: Keys) -> str:
    if keys["adapter._target_"].endswith(".LoRA"):
        return "LoRA, rank 4 everywhere"
    moved = keys["adapter.init_r"] > keys["adapter.target_r"]
    return "AdaLoRA, mean rank 4" if moved else "AdaLoRA's triplets, rank 4 everywhere"


RANKS = (1, 2, 4, 8, 64)
ALL = "q, k, v, o"
STUDIES = {
    study.name: study
    for study in (
        Study(
            "rank_study",
            ranked,
            tuple(f"{where}: r = {r}" for where in ("q, v", ALL) for r in RANKS),
            (
                Claim("on q, k, v, o rank 1 does as well as rank 64", f"{ALL}: r = 1", f"{ALL}: r = 64", same=True),
                Claim("on q, v rank 4 does as well as rank 64", "q, v: r = 4", "q, v: r = 64", same=True),
                Claim("rank 1 on q, k, v, o is better than rank 2 on q, v", f"{ALL}: r = 1", "q, v: r = 2"),
            ),
        ),
        Study(
            "which_weights",
            letters,
            ("q", "k", "v", "o", "q, k", "q, v", ALL),
            (
                Claim("v is better than q", "v", "q"),
                Claim("q and v together are better than q and k", "q, v", "q, k"),
                Claim("all four are as good as q and v", ALL, "q, v", same=True),
            ),
        ),
        Study(
            "nf4_study",
            quantised,
            ("fp32", "NF4", "NF4 + double quantisation", "FP4"),
            (
                Claim("over NF4 the loss is as good as over the fp32 base", "NF4", "fp32", same=True),
                Claim("double quantisation costs nothing", "NF4 + double quantisation", "NF4", same=True),
                Claim("NF4 is better than FP4", "NF4", "FP4"),
            ),
        ),
        Study(
            "high_rank",
            scaled,
            tuple(f"{name}, r = {r}" for r in (64, 128) for name in ("LoRA", "LoRA+", "rsLoRA", "rsLoRA, LoRA+")),
            (
                Claim("at r = 128 rsLoRA is better than LoRA", "rsLoRA, r = 128", "LoRA, r = 128"),
                Claim("at r = 128 LoRA+ is better than LoRA", "LoRA+, r = 128", "LoRA, r = 128"),
                Claim("rsLoRA gains from r = 64 to r = 128", "rsLoRA, r = 128", "rsLoRA, r = 64"),
                Claim("LoRA gains nothing from r = 64 to r = 128", "LoRA, r = 128", "LoRA, r = 64", same=True),
            ),
        ),
        Study(
            "adalora_budget",
            spread_out,
            ("LoRA, rank 4 everywhere", "AdaLoRA's triplets, rank 4 everywhere", "AdaLoRA, mean rank 4"),
            (
                Claim("AdaLoRA is better than LoRA", "AdaLoRA, mean rank 4", "LoRA, rank 4 everywhere"),
                Claim(
                    "moving the ranks is what helps",
                    "AdaLoRA, mean rank 4",
                    "AdaLoRA's triplets, rank 4 everywhere",
                ),
            ),
        ),
    )
}
