"""What this machine does in a second: ``python -m benchmarks.rates FOLDER``, for the curves' predictions.

Products of a model's shapes (TFLOP/s), causal attention forward and backward by causal FLOPs (TFLOP/s), copies (GB/s of
bytes read and written), NF4 weights dequantised (GB/s of what comes out).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import task
from benchmarks.arm import now
from benchmarks.shapes import SHAPES, SMOLLM2, Shape
from lowrank.adapters.base import dense_weight
from lowrank.fast import linear
from lowrank.quant.convert import quantize

REPEATS = 5


def main(folder: Path) -> None:
    work = task.read(folder)
    shape = SMOLLM2 if work.model == "smollm2" else SHAPES[work.model]
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    found = {
        "products": products(shape, 1024 if work.device == "cpu" else 8192, dtype, work.device) / 1e12,
        "attention": attention(shape, work.max_length, dtype, work.device) / 1e12,
        "copy": copies(dtype, work.device) / 1e9,
        "dequantise": dequantised(shape, dtype, work.device) / 1e9,
    }
    print(json.dumps(found), flush=True)


def fastest(call: Callable[[], Any], device: str) -> float:
    """Median seconds of a call, after one that warms up."""
    call()
    seconds = []
    for _ in range(REPEATS):
        started = now(device)
        call()
        seconds.append(now(device) - started)
    return statistics.median(seconds)


def products(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> float:
    """FLOP/s over one layer's frozen products, each in both directions."""
    widths = [(shape.d, shape.d)] * 2 + [(shape.d, shape.kv)] * 2 + [(shape.d, shape.f)] * 3
    weights = [torch.randn(out, into, dtype=dtype, device=device) for into, out in widths]  # (out, in)
    inputs = {width: torch.randn(tokens, width, dtype=dtype, device=device) for pair in widths for width in pair}

    def layer() -> None:
        for weight in weights:
            linear.product(inputs[weight.shape[1]], weight)
            linear.product(inputs[weight.shape[0]], weight.T)

    return 4 * tokens * sum(into * out for into, out in widths) / fastest(layer, device)


def attention(shape: Shape, s: int, dtype: torch.dtype, device: str) -> float:
    """Causal FLOP/s of one layer's attention, 6·s²·d for its forward and backward."""
    width, groups = shape.d // shape.heads, shape.kv * shape.heads // shape.d
    q = torch.randn(1, shape.heads, s, width, dtype=dtype, device=device, requires_grad=True)
    k, v = (torch.randn(1, groups, s, width, dtype=dtype, device=device, requires_grad=True) for _ in range(2))

    def layer() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()

    return 6 * s * s * shape.d / fastest(layer, device)


def copies(dtype: torch.dtype, device: str) -> float:
    source = torch.empty((64 if device == "cpu" else 1024) << 20, dtype=torch.uint8, device=device).view(dtype)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device)


def dequantised(shape: Shape, dtype: torch.dtype, device: str) -> float:
    holder = nn.Sequential(nn.Linear(shape.d, shape.f, bias=False, dtype=dtype))
    layer = quantize(holder, "nf4", double=True).to(device)[0]
    return shape.d * shape.f * dtype.itemsize / fastest(lambda: dense_weight(layer), device)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
