"""A LoRA's fp32 values in the dtype that products run in, cast once an optimizer step.

Between two steps the values are the same for every micro-batch, forward and backward. A cast is used again only in
the optimizer step it was made in, by the run's clock, while neither tensor has been written to (its version) or moved
(its address): a write past autograd, such as an optimizer's into a flat buffer of which A and B are views, leaves the
version as it was, but lies between two steps. A clock that nobody sets gives no such bound: then every pass casts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HELD = "_cast"  # the adapter's attribute


def cast(lora: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A, B) in ``dtype``, without a gradient: themselves where that is theirs."""
    A, B = lora.A.detach(), lora.B.detach()
    if A.dtype == dtype == B.dtype:
        return A, B
    if torch.compiler.is_compiling() or lora.clock.now is None:  # a graph would be made anew at each step
        return A.to(dtype), B.to(dtype)
    now = (lora.clock.now[0], dtype, *((t.data_ptr(), t._version) for t in (A, B)))
    held = vars(lora).get(HELD)
    if held is None or held[0] != now:
        held = vars(lora)[HELD] = (now, A.to(dtype), B.to(dtype))
    return held[1], held[2]
