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
WEIGHT = ("packed", "absmax", "nested")
STATE = (*WEIGHT, "bias")


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
        for name in STATE:
            self.register_parameter(name, None)

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None, *, double: bool, compute_dtype: torch.dtype | None = None
    ) -> NF4Linear:
        """Quantises ``weight`` (out, in); a bias is kept as it is. On the meta device only the sizes are made."""
        layer = cls(weight.shape[1], weight.shape[0], double=double, compute_dtype=compute_dtype)
        if bias is not None:
            layer.bias = frozen(bias.detach())
        layer.allocate(weight.device)
        return layer if weight.is_meta else layer.fill(weight)

    def allocate(self, device: torch.device | str) -> None:
        """Gives the state its sizes, without values."""

        def room(size: int) -> nn.Parameter:
            return frozen(torch.empty(size, dtype=torch.uint8, device=device))

        weights = self.in_features * self.out_features
        scales = -(-weights // BLOCK)
        self.packed = room((weights + 1) // 2)
        self.absmax = room(scales if self.double_quantized else 4 * scales)
        self.nested = room(4 * (-(-scales // NESTED_BLOCK) + 1)) if self.double_quantized else None

    def fill(self, weight: Tensor) -> NF4Linear:
        """Quantises ``weight`` (out, in) into the state."""
        packed, state = bnb().quantize_4bit(
            in_known_dtype(weight.detach()).contiguous(),
            blocksize=BLOCK,
            compress_statistics=self.double_quantized,
            quant_type="nf4",
        )
        self.packed.data.copy_(packed.view(-1))
        self.absmax.data.copy_(as_bytes(state.absmax))
        if self.nested is not None:
            self.nested.data.copy_(as_bytes(torch.cat([state.state2.absmax, state.offset.view(1)])))
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in) in ``dtype`` (fp32 unless given)."""
        wanted = dtype or torch.float32
        if self.packed.is_meta:  # a plan is made over layers without values
            return torch.empty(self.out_features, self.in_features, dtype=wanted, device="meta")
        # bitsandbytes knows fp32, bf16 and fp16: a wider type is widened from its fp32 values
        native = wanted if wanted in (torch.bfloat16, torch.float16) else torch.float32
        flat = bnb().dequantize_4bit(self.packed.view(-1, 1), self.quant_state(native))
        return flat.view(self.out_features, self.in_features).to(wanted)

    def codes(self) -> Tensor:
        """The number of each weight's level, (out, in) uint8 in 0 … 15."""
        pairs = torch.stack([self.packed >> 4, self.packed & 15], dim=1)  # (bytes, 2): the high half comes first
        return pairs.view(-1)[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def scales(self) -> Tensor:
        """The scale of each weight's block, (out, in) fp32: a weight is its level times its scale, to the bit."""
        state = self.quant_state(torch.float32)
        absmax = state.absmax  # (blocks,)
        if state.state2 is not None:
            absmax = bnb().dequantize_blockwise(absmax, state.state2) + state.offset
        size = self.out_features * self.in_features
        return absmax.repeat_interleave(BLOCK)[:size].view(self.out_features, self.in_features)

    def recode(self, codes: Tensor) -> NF4Linear:
        """Takes these codes (out, in), in 0 … 15, under the scales that are here; in place."""
        flat = F.pad(codes.reshape(-1).to(torch.uint8), (0, codes.numel() % 2))
        self.packed.data.copy_((flat[::2] << 4) | flat[1::2])
        return self

    def adopt(self, other: NF4Linear) -> NF4Linear:
        """Takes the weight of a layer of the same sizes, scales and codes; in place."""
        for name in WEIGHT:
            held = getattr(other, name)
            setattr(self, name, None if held is None else frozen(held.detach().clone()))
        return self

    def twin(self, bias: Tensor | None) -> NF4Linear:
        """A layer of the same weight, with ``bias``, that shares no tensor with this one."""
        layer = NF4Linear(
            self.in_features, self.out_features, double=self.double_quantized, compute_dtype=self.compute_dtype
        )
        layer.bias = None if bias is None else frozen(bias.detach().clone())
        return layer.adopt(self).train(self.training)

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
            # One long row, as it was quantised: asked for rows of a width that blocks do not divide, the CPU kernel
            # (bitsandbytes 0.50) starts a new block at each row and so takes the wrong scales.
            shape=torch.Size((1, self.out_features * self.in_features)),
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
        """A layer made without values takes the sizes of what is loaded; ``nested`` tells double quantisation."""
        if not any(key.startswith(prefix) for key in state_dict) and self.packed is not None:
            return super()._load_from_state_dict(state_dict, prefix, *args)  # not about this layer
        for name in STATE:
            held, given = getattr(self, name), state_dict.get(f"{prefix}{name}")
            if given is None and name in ("nested", "bias"):
                setattr(self, name, None)
            elif given is not None and (held is None or name in ("absmax", "nested")):
                setattr(self, name, frozen(torch.empty_like(given)))
            elif held is None:
                setattr(self, name, frozen(torch.empty(0, dtype=torch.uint8)))  # so that it is reported missing
        self.double_quantized = self.nested is not None
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


def in_known_dtype(weight: Tensor) -> Tensor:
    """bitsandbytes quantises fp32, bf16 and fp16; a wider type goes through fp32."""
    return weight if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else weight.float()


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
