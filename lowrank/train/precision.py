"""Numeric precision in one small object: what runs under autocast, and the loss scaling that fp16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """``fp32``, ``bf16`` or ``fp16`` on a device type. The scaler does nothing unless fp16.

    Parameters that train are fp32 in all three; autocast makes the matrix products half-precision.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device, self.dtype = name, device, DTYPES[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self.good: float | Tensor = self.scaler.get_scale()  # that of the last step made

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.name == "fp32" else torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        self.scaled(loss).backward()

    def scaled(self, loss: Tensor) -> Tensor:
        """What backward starts from: fp16's gradients would vanish without."""
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def may_halve(self) -> bool:
        """Whether a gradient that is not finite may be the loss scale's doing: the step is then tried at half of it."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def halve(self) -> None:
        """Instead of a step in which an unscaled gradient was not finite: it comes again at half the scale."""
        self.scaler.update()

    def made(self) -> None:
        """After the optimizer's step: the scale may have been low for long enough. The host does not wait for it."""
        if self.scaler.is_enabled():
            self.scaler.update()
            self.good = self.scaler.scale(torch.ones((), device=self.device))

    def forget(self) -> None:
        """A step that is given up: the scale is again that of the last one made, however often this one halved it."""
        if self.scaler.is_enabled():
            self.scaler.scale(torch.zeros((), device=self.device))  # one that has scaled nothing yet cannot be set
            self.scaler.update(self.good)

    def state_dict(self) -> dict[str, Any]:
        return {**self.scaler.state_dict(), "good": float(self.good)} if self.scaler.is_enabled() else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)
            self.good = state["good"]


def resolve(name: str, device: torch.device) -> str:
    """``auto`` is bf16 where the device has it in hardware (by capability, never by a stopwatch), else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return "bf16" if device.type == "cpu" and amx is not None and amx() else "fp32"
