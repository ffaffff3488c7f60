"""A ledger: what a run will take, part by part, before it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MB = 1e6  # bytes, as everywhere a run tells of memory
PARTS = {
    "interpreter": "Python, PyTorch and the data, before there is a model",
    "weights": "the base's dense parameters",
    "quantisation": "4-bit weights and their scales",
    "buffers": "of the base",
    "adapters": "values that train, and buffers of their adapters",
    "gradients": "of what trains",
    "optimizer": "its state",
    "activations": "kept for backward in the largest micro-batch",
    "loss": "work space of head and loss",
    "recompute": "one block's activations, computed again",
    "dequantisation": "dense weights of one 4-bit layer at a time",
    "workspace": "what backward makes and drops again",
    "evaluation": "most of a held-out batch or of generating",
    "loading": "while the weights are read",
    "slack": "holes and rounding of the allocator, libraries, compiled products",
}


@dataclass(frozen=True)
class Shape:
    """What the largest batches are, in tokens."""

    step: tuple[int, ...]  # lengths of the documents of the largest micro-batch
    targets: int  # of that micro-batch
    evaluation: tuple[int, ...]  # of the largest held-out batch
    prompts: tuple[int, ...]  # of the largest batch that is generated from
    packed: bool
    source: str  # the data's own lengths, or why data.max_length stands for them

    @property
    def tokens(self) -> int:
        return sum(self.step) if self.packed else len(self.step) * max(self.step)

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "packed": self.packed,
            "step": {"documents": len(self.step), "tokens": self.tokens, "targets": self.targets},
            "evaluation": {"documents": len(self.evaluation), "tokens": sum(self.evaluation)},
            "generation": {"prompts": len(self.prompts), "tokens": sum(self.prompts)},
        }


@dataclass(frozen=True)
class Ledger:
    """Bytes by part, the peak, and FLOPs a token.

    Parts are those of the moment at which a training step takes most, so that they add up to ``phases["step"]``; but
    ``evaluation`` and ``loading`` are other moments', in bytes above what lies there then. ``peak`` is the most of all
    ``phases``, in bytes: the allocator's on CUDA, the process's on a CPU.
    """

    parts: dict[str, int]
    phases: dict[str, int]
    flops_per_token: dict[str, float]  # forward, backward, total, at data.max_length
    shape: Shape
    device: str
    tokens_per_s: float | None = None  # by a calibration
    notes: tuple[str, ...] = field(default=())

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def when(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def line(self) -> str:
        flops = self.flops_per_token["total"] / 1e9
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:,.0f} tokens/s"
        return f"predicted: peak {self.peak / MB:,.0f} MB ({self.when}), {flops:,.3g} GFLOPs a token{speed}"

    def to_dict(self) -> dict[str, Any]:
        """``predicted`` of ledger.json; ``flops_per_token`` is the sum of forward and backward."""
        return {
            "peak_mb": self.peak / MB,
            "peak_in": self.when,
            "flops_per_token": self.flops_per_token["total"],
            "flops": {name: self.flops_per_token[name] for name in ("forward", "backward")},
            "parts_mb": in_mb(self.parts),
            "phases_mb": in_mb(self.phases),
            "shape": self.shape.to_dict(),
            "device": self.device,
            **({} if self.tokens_per_s is None else {"tokens_per_s": self.tokens_per_s}),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [(name, self.parts[name], PARTS.get(name, "")) for name in self.parts if self.parts[name]]
        lines = [f"{name:<15} {size / MB:>10,.1f} MB  {what}" for name, size, what in rows]
        peaks = ", ".join(f"{name} {size / MB:,.0f}" for name, size in self.phases.items())
        flops = self.flops_per_token
        lines.append(f"{'peak':<15} {self.peak / MB:>10,.1f} MB  on {self.device}; {peaks}")
        lines.append(
            f"{'FLOPs a token':<15} {flops['total'] / 1e9:>10,.3f} G   forward {flops['forward'] / 1e9:,.3f}, "
            f"backward {flops['backward'] / 1e9:,.3f}"
        )
        if self.tokens_per_s is not None:
            lines.append(f"{'tokens a second':<15} {self.tokens_per_s:>10,.0f}")
        step = f"{len(self.shape.step)} documents, {self.shape.tokens:,} tokens, {self.shape.targets:,} targets"
        lines.append(f"largest micro-batch: {step}; largest held-out batch: {sum(self.shape.evaluation):,} tokens")
        return "\n".join([*lines, f"lengths: {self.shape.source}", *self.notes])


def in_mb(sizes: Mapping[str, int]) -> dict[str, float]:
    return {name: size / MB for name, size in sizes.items()}
