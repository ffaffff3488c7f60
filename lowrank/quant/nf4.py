"""A linear layer whose weight is held in 4-bit NormalFloat (QLoRA, arXiv 2305.14314, section 3).

Blocks of 64 weights share one fp32 scale (absmax) and each weight is one of the 16 NF4 levels; with double
quantisation the scales themselves are held in 8 bits, in blocks of 256 with one fp32 scale each.
Quantisation and dequantisation are bitsandbytes' (``functional.quantize_4bit``, ``dequantize_4bit``).
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 64  # weights to a scale
NESTED_BLOCK = 256  # scales to a scale of scales


@cache
def bnb() -> Any:
    """bitsandbytes' functions, imported when a weight is first quantised: that takes more than a second.

    On a CPU the import logs that an optional kernel is missing; nothing here would call it.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional as functional

    return functional


class NF4Linear(nn.Module):
    """y = x Wᵀ + b with W (out, in) kept as 4-bit NF4 and dequantised at each use.

    All quantised state is ``uint8``, because ``.bfloat16()``, ``.half()`` and ``.double()`` cast every floating
    tensor of a module and would ruin the statistics: ``packed`` (out·in/2,), two weights a byte; ``absmax``, the
    blocks' scales (8-bit with double quantisation, else fp32 seen as bytes); ``nested`` (double quantisation
    only), the fp32 scales of the scales and, last, their mean. They are plain parameters, so FSDP2 shards them.

    Computes in its input's dtype (autocast's under autocast) unless ``compute_dtype`` says otherwise.
    """

    packed: nn.Parameter
    absmax: nn.Parameter
    nested: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, double: bool, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.double_quantized, self.compute_dtype = double, compute_dtype
        self.register_parameter("bias", None)
        self.register_parameter("nested", None)

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None, *, double: bool, compute_dtype: torch.dtype | None = None
    ) -> NF4Linear:
        """Quantises ``weight`` (out, in); a bias is kept as it is. On the meta device only the sizes are made."""
        layer = cls(weight.shape[1], weight.shape[0], double=double, compute_dtype=compute_dtype)
        if bias is not None:
            layer.bias = frozen(bias.detach())
        if weight.is_meta:
            return layer.sized()
        packed, state = bnb().quantize_4bit(
            weight.detach().contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
        )
        layer.packed = frozen(packed.view(-1))
        layer.absmax = frozen(as_bytes(state.absmax))
        if double:
            layer.nested = frozen(as_bytes(torch.cat([state.state2.absmax, state.offset.view(1)])))
        return layer

    def sized(self) -> NF4Linear:
        """Gives the state its sizes on the meta device."""
        weights = self.in_features * self.out_features
        scales = -(-weights // BLOCK)
        self.packed = frozen(torch.empty((weights + 1) // 2, dtype=torch.uint8, device="meta"))
        self.absmax = frozen(
            torch.empty(scales if self.double_quantized else 4 * scales, dtype=torch.uint8, device="meta")
        )
        if self.double_quantized:
            nested = -(-scales // NESTED_BLOCK) + 1
            self.nested = frozen(torch.empty(4 * nested, dtype=torch.uint8, device="meta"))
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in) in ``dtype`` (fp32 unless given)."""
        wanted = dtype or torch.float32
        # bitsandbytes knows fp32, bf16 and fp16: a wider type is widened from its fp32 values
        native = wanted if wanted in (torch.bfloat16, torch.float16) else torch.float32
        dense = bnb().dequantize_4bit(self.packed.view(-1, 1), self.quant_state(native))
        return dense.to(wanted)

    def quant_state(self, dtype: torch.dtype) -> Any:
        """bitsandbytes' view of the bytes held here, built at each use: no state hides in a Python object."""
        device = self.packed.device
        nested, offset = None, None
        if self.double_quantized:
            assert self.nested is not None
            scales = self.nested.view(torch.float32)
            absmax, offset = self.absmax.data, scales[-1]
            nested = bnb().QuantState(
                absmax=scales[:-1], blocksize=NESTED_BLOCK, code=byte_levels(device), dtype=torch.float32
            )
        else:
            absmax = self.absmax.data.view(torch.float32)
        return bnb().QuantState(
            absmax=absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=nf4_levels(device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=offset,
            state2=nested,
        )

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        if self.compute_dtype is None and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        y = DequantizedMatmul.apply(x.to(dtype), self)  # (…, out)
        if self.bias is not None:
            y = y + self.bias.to(dtype)
        return y.to(x.dtype) if self.compute_dtype else y

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in (
            "packed",
            "absmax",
            "nested",
            "bias",
        ):  # a layer made without values takes the file's shapes
            if f"{prefix}{name}" in state_dict and getattr(self, name, None) is None:
                setattr(self, name, frozen(torch.empty_like(state_dict[f"{prefix}{name}"])))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def nbytes(self) -> int:
        """Bytes of the quantised weight, its statistics included and its bias left out."""
        return sum(p.numel() for p in (self.packed, self.absmax, self.nested) if p is not None)

    def extra_repr(self) -> str:
        double = ", double quantised" if self.double_quantized else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4{double}"


class DequantizedMatmul(torch.autograd.Function):
    """x Wᵀ with W dequantised in forward and again in backward: between them only the 4-bit bytes exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        with torch.autocast(grad.device.type, enabled=False):
            return (grad @ ctx.layer.dequantize(ctx.dtype)) if ctx.needs_input_grad[0] else None, None


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as ``uint8``."""
    return tensor.contiguous().view(-1).view(torch.uint8)


@cache
def nf4_levels(device: torch.device) -> Tensor:
    """The 16 levels of NormalFloat-4, (16,) fp32."""
    return bnb().get_4bit_type("nf4", device=device)


@cache
def byte_levels(device: torch.device) -> Tensor:
    """The 256 levels of the dynamic 8-bit type that holds the scales under double quantisation, (256,) fp32."""
    return bnb().create_dynamic_map().to(device)
