"""The pieces of ``make bench-cuda``: models of random weights on one GPU, packs of 8,192 tokens, bf16.

The first arm of a shape that runs makes its model (7B: 13.5 GB in the cache folder) and takes minutes for it, which
``models`` does by itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.pieces import PACKED, SFT, Arm, Making, Piece, Size
from benchmarks.task import Task

PEFT_PACKED, OURS, LIGER, TRL = "PEFT, our packs and head rows", "lowrank", "TRL, PEFT, Liger", "TRL, PEFT"
T, S = 8192, 2048
ONE = Size("1b", "1b", None, 8, 8, T, S, 5, 3, 50, (8, 16, 32, 64), (32000, 128256, 256000))
SEVEN, EIGHT = replace(ONE, real="7b", cut="7b"), replace(ONE, real="8b", cut="8b")


def cuda(folder: Path) -> list[Piece]:
    one, seven, eight = (Making(folder, size, "cuda", "bf16") for size in (ONE, SEVEN, EIGHT))
    return [
        Piece("rates", "products, attention, copies and dequantising, on 7B's shapes", rates(seven), 1),
        *(peers(made, name) for made, name in ((one, "1b"), (seven, "7b"))),
        *(others(made, name) for made, name in ((one, "1b"), (seven, "7b"))),
        alone(eight, "8b", "fits in 50 GB where PEFT runs out of 80"),
        alone(eight, "8b-recompute", "with recomputation", recompute=True),
        nf4(seven, "7b-nf4", T),
        nf4(seven, "7b-nf4-2k", S),
        alone(seven, "7b-nf4-recompute", "QLoRA with recomputation", "nf4", True),
        dropout(one),
        loss(eight),
        *(replace(piece, name=f"1b-{piece.name}") for piece in curves(one)),
    ]


def curves(made: Making) -> list[Piece]:
    return [
        replace(made, size=replace(made.size, tokens=2 * T)).lengths(),
        replace(made, size=replace(made.size, tokens=T // 2)).memory(),
        made.variance(),
        replace(made, size=replace(made.size, shortest=S // 2)).residents(),
        made.ranks(),
        replace(made, size=replace(made.size, tokens=2048)).loss_memory(),
        made.targets(),
        made.top_layers(),
    ]


def packs(made: Making, tokens: int = T) -> Task:
    """Documents of 2,048 tokens: as many a step as make ``tokens``, for padded arms too."""
    task = made.generated((S,), tokens, steps=made.size.steps)
    return replace(task, micro_batch=tokens // S, micro_batch_tokens=None)


def rates(made: Making) -> tuple[Arm, ...]:
    return (Arm("rates", packs(made), "benchmarks.rates"),)


def peers(made: Making, name: str) -> Piece:
    work = packs(made)
    return Piece(f"{name}-peft", "packs of 8,192", (Arm(PEFT_PACKED, work, PACKED), Arm(OURS, work)), 5)


def others(made: Making, name: str) -> Piece:
    work = packs(made)
    arms = (Arm(TRL, work, SFT), Arm(LIGER, work, SFT, ("liger",)), Arm(OURS, work))
    return Piece(f"{name}-liger", "TRL's trainer, with Liger's kernels and without", arms, 5)


def alone(made: Making, name: str, about: str, kind: str = "dense", recompute: bool = False) -> Piece:
    """Memory: PEFT beside it as long as both are dense, and running out is its result."""
    work = replace(packs(made), recompute=recompute)
    if kind == "nf4":
        return Piece(name, about, (Arm("nf4", quantised(work)),), 3)
    return Piece(name, about, (Arm(PEFT_PACKED, work, PACKED), Arm(OURS, work)), 3)


def quantised(work: Task) -> Task:
    return replace(work, extra=("quant=nf4", "quant.double=true"))


def nf4(made: Making, name: str, tokens: int) -> Piece:
    work = packs(made, tokens)
    return Piece(name, f"QLoRA against bf16, {tokens:,} a step", (Arm("dense", work), Arm("nf4", quantised(work))), 5)


def dropout(made: Making) -> Piece:
    work = packs(made)
    arms = (Arm("LoRA", work), Arm("dropout 0.05", replace(work, extra=("adapter.dropout=0.05",))))
    return Piece("1b-dropout", "keyed dropout", arms, 5)


def loss(made: Making) -> Piece:
    work, sizes = packs(made), (str(T), "128256", "4096")
    arms = tuple(Arm(how, work, "benchmarks.loss_layer", (*sizes, how)) for how in ("chunks", "plain"))
    return Piece("loss-8b", "the loss alone: 8,192 × 128,256 × 4,096", arms, 5)
