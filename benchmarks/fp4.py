"""A dense base whose linear weights stand on FP4's levels: what training over an FP4 base computes with, to the bit.

lowrank itself quantises to NF4 alone. A frozen 4-bit weight enters a run through its dequantised value only, so for a
comparison of losses the values will do; memory is that of a dense model.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lowrank import assemble, compose
from lowrank.models.quiet import quiet
from lowrank.quant.convert import quantizable
from lowrank.quant.nf4 import BLOCK, bnb


def write(folder: Path, quant_type: str = "fp4", overrides: tuple[str, ...] = ("model=smollm2",)) -> Path:
    """The folder, of which a run is ``model=hf model.name=FOLDER``; made only where it is not there."""
    if (folder / "config.json").is_file():
        return folder
    config = compose.compose([*overrides, "loop.device=cpu", "model.dtype=fp32", "loop.precision=fp32"])
    parts = assemble.parts(config)
    model = assemble.base(parts.config, parts.dtype)
    with torch.no_grad():
        for path in quantizable(model, ["lm_head"]):
            weight = model.get_submodule(path).weight  # (out, in)
            weight.copy_(rounded(weight, quant_type))
    with quiet():
        model.save_pretrained(folder)
        parts.tokenizer.save_pretrained(folder)
    return folder


def rounded(weight: torch.Tensor, quant_type: str) -> torch.Tensor:
    """``weight`` (out, in) quantised in blocks of 64 with fp32 scales, and back."""
    row = weight.detach().reshape(1, -1)  # blocks run on over the rows
    packed, state = bnb().quantize_4bit(row, blocksize=BLOCK, compress_statistics=False, quant_type=quant_type)
    return bnb().dequantize_4bit(packed, state).view_as(weight)
