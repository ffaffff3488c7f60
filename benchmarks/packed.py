"""PEFT with everything of ours that it can be given: ``python -m benchmarks.packed FOLDER [fp64]``.

A plain loop over PEFT's layers: our packs (documents end to end, positions that restart), our attention within each
document, logits on target rows alone, fused AdamW. What is left of the difference is layers, LoRA and the loss.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.arm import Result, now, peak_mb, token_hash, versions
from benchmarks.peer import build
from benchmarks.task import IGNORED
from lowrank.data.pack import Batch, pack
from lowrank.models import attention


@dataclass(frozen=True)
class Document:
    row: int
    tokens: tuple[int, ...]
    target: tuple[bool, ...]


def batches(about: dict[str, Any]) -> Iterator[Batch]:
    """A pack a step, made when it is asked for."""
    first = 0
    for count in about["steps"]:
        rows = about["examples"][first : first + count]
        yield pack(
            [
                Document(first + n, tuple(row["input_ids"]), tuple(label != IGNORED for label in row["labels"]))
                for n, row in enumerate(rows)
            ]
        )
        first += count


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    """Mean over target tokens."""
    logits = model(**batch.inputs, use_cache=False, logits_to_keep=batch.positions).logits[0]  # (targets, vocabulary)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.targets)


def train(model: Any, about: dict[str, Any]) -> dict[str, list[Any]]:
    """Losses, learning rates, seconds, tokens and their hashes of each step."""
    settings, device = about["trainer"], about["device"]
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = settings["adam_beta1"], settings["adam_beta2"]
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings["learning_rate"],
        betas=betas,
        eps=settings["adam_epsilon"],
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    total = settings["max_steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / total)
    found: dict[str, list[Any]] = {name: [] for name in ("losses", "lrs", "seconds", "real_tokens", "token_hashes")}
    source, last = batches(about), now(device)
    half = about["precision"] == "bf16"
    for _ in range(total):
        batch = next(source).to(device)
        with torch.autocast(device.partition(":")[0], torch.bfloat16) if half else nullcontext():
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings["max_grad_norm"])
        found["lrs"].append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        found["losses"].append(float(loss.detach()))
        at = now(device)
        found["seconds"].append(at - last)
        found["real_tokens"].append(batch.real_tokens)
        found["token_hashes"].append(token_hash(batch.inputs["input_ids"][0].tolist()))
        last = now(device)
    return found


def main(folder: Path, double: bool = False) -> None:
    """``double``: every number in fp64, against which the rounding of the others is seen."""
    about = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    model = build(folder, about)
    model = model.double() if double else model
    base = model.get_base_model()
    refused = attention.install(base)
    if refused:
        raise SystemExit(f"PEFT cannot be given our packs: {refused}")
    if about["recompute"]:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    found = train(model.train(), about)
    Result(
        arm="peft packed",
        positions=found["real_tokens"],
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        peak_mb=peak_mb(about["device"]),
        threads=torch.get_num_threads(),
        versions=versions(["peft", "torch", "transformers"]),
        **found,
    ).print()


if __name__ == "__main__":
    main(Path(sys.argv[1]), double="fp64" in sys.argv[2:])
