"""A small adapter that is right, and the same with one fault each: what people get wrong when they write a method."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters import Adapter
from lowrank.adapters.base import shape
from lowrank.adapters.methods.dropout import drop

SCALE = 2.0


class Right(Adapter):
    """h = W x + s·c B C A drop(x): A drawn at random, B zero, C (r, r) the identity, and c grows with the steps."""

    strength: Tensor

    def __init__(self, base: nn.Module, *, generator: torch.Generator, r: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        out_features, in_features = shape(base)
        self.A = nn.Parameter(torch.randn(r, in_features, generator=generator) / in_features**0.5)
        self.B = nn.Parameter(torch.zeros(out_features, r))
        self.C = nn.Parameter(torch.eye(r))
        self.register_buffer("strength", torch.ones(()))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        return base(x) + self.added(x)

    def added(self, x: Tensor) -> Tensor:
        A, B, C, c = (value.to(x.dtype) for value in (self.A, self.B, self.C, self.strength))
        return SCALE * c * F.linear(F.linear(F.linear(self.dropped(x), A), C), B)  # (…, out)

    def dropped(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        return drop(x, p, self.clock.draw(self.group)) if p else x

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + SCALE * (self.strength * self.B @ self.C @ self.A).to(weight), bias

    @classmethod
    def hook(cls, adapters: dict[str, Any], *, steps: int) -> Any:
        return Growing(adapters)


class Growing:
    """c = 1 + the steps done / 10."""

    def __init__(self, adapters: dict[str, Any]) -> None:
        self.adapters, self.count = adapters, 0

    def before_update(self, step: int) -> None: ...

    def after_update(self, step: int) -> None:
        self.count += 1
        for adapter in self.adapters.values():
            adapter.strength = torch.tensor(1 + self.count / 10)

    def after_step(self, record: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class KeepsItsBase(Right):
    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__(base, generator=generator)
        self.base = base


class NeedsValues(Right):
    """Its constructor fails over a stand-in without values, so that no plan can be made."""

    def __init__(self, base: Any, *, generator: torch.Generator) -> None:
        super().__init__(base, generator=generator)
        self.size = float(base.weight.norm())


class StartsElsewhere(Right):
    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__(base, generator=generator)
        self.B = nn.Parameter(torch.randn(self.B.shape, generator=generator) / 100)


class UnfreezesTheBase(Right):
    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        return base.requires_grad_(True)(x) + self.added(x)


class DrawsFromTheDefaultGenerator(Right):
    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__(base, generator=generator)
        self.A = nn.Parameter(torch.randn_like(self.A))


class DependsOnOtherSites(Right):
    @classmethod
    def shared(cls, shapes: dict[str, tuple[int, int]], *, generator: torch.Generator, **_: Any) -> dict[str, Any]:
        return {"shared_count": len(shapes)}

    def __init__(self, base: nn.Module, *, generator: torch.Generator, shared_count: int) -> None:
        super().__init__(base, generator=generator)
        self.A.data /= shared_count


class Transposing(torch.autograd.Function):
    """z Cᵀ with the gradient of C transposed."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, C: Tensor) -> Tensor:
        ctx.save_for_backward(z, C)
        return z @ C.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        z, C = ctx.saved_tensors
        return grad @ C, z.flatten(0, -2).T @ grad.flatten(0, -2)


class TransposesAGradient(Right):
    def added(self, x: Tensor) -> Tensor:
        A, B, C, c = (value.to(x.dtype) for value in (self.A, self.B, self.C, self.strength))
        return SCALE * c * F.linear(Transposing.apply(F.linear(self.dropped(x), A), C), B)


class RoundsTheBase(Right):
    identity_at_start = False

    def __init__(self, base: Any, *, generator: torch.Generator) -> None:
        super().__init__(base, generator=generator)
        base.weight.data.copy_(base.weight.data.bfloat16())


class MergesAtAnotherScale(Right):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + (self.B @ self.C @ self.A).to(weight), bias


class MergesInPlace(Right):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.add_(SCALE * (self.B @ self.C @ self.A).to(weight)), bias


class ComputesInFp32(Right):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x.float())


class HoldsAPlainTensor(Right):
    """A tensor that is neither parameter nor buffer is in no file and moves to no device."""

    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__(base, generator=generator)
        self.sign = torch.rand(self.A.shape[1], generator=generator).round() * 2 - 1

    def added(self, x: Tensor) -> Tensor:
        return super().added(x * self.sign.to(x.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + SCALE * (self.strength * self.B @ self.C @ self.A * self.sign).to(weight), bias


class DropsInEvaluation(Right):
    def dropped(self, x: Tensor) -> Tensor:
        return drop(x, self.dropout, self.clock.draw(self.group)) if self.dropout else x


class DropsUnkeyed(Right):
    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class CountsItsCalls(Right):
    """A recomputed forward drops other entries than the first one."""

    calls = 0

    def dropped(self, x: Tensor) -> Tensor:
        self.calls += 1
        p = self.dropout if self.training else 0.0
        return drop(x, p, self.clock.draw(f"{self.group} {self.calls % 2}")) if p else x


class OnBlocks(Right):
    """The same behind a block: what it adds depends on the block's output alone."""

    sites = ("block",)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = base(*args, **kwargs)
        if isinstance(found, tuple):
            return self.behind(found[0]), *found[1:]
        return self.behind(found)

    def behind(self, h: Tensor) -> Tensor:
        return h + self.added(h)

    merged = Adapter.merged


class LooksBack(OnBlocks):
    """Reads the token before, whichever document, or cached part, it is of."""

    def behind(self, h: Tensor) -> Tensor:
        return h + self.added(F.pad(h, (0, 0, 1, 0))[:, :-1])  # (batch, seq, hidden)


class CountsPositionsAnew(OnBlocks):
    """Takes the first token it is given for position 0: wrong in a pack's second document and with a cache."""

    def behind(self, h: Tensor) -> Tensor:
        return h + self.added(h) * torch.arange(1, h.shape[1] + 1, device=h.device)[:, None].to(h.dtype)


class ForgetsAKey(Right):
    """Its buffer, drawn at random, is in no file."""

    gain: Tensor

    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__(base, generator=generator)
        self.register_buffer("gain", torch.rand((), generator=generator), persistent=False)

    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * self.gain.to(x.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.gain * (super().merged(weight, bias)[0] - weight), bias


class Forgetful(Growing):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LosesItsCountOnResume(Right):
    @classmethod
    def hook(cls, adapters: dict[str, Any], *, steps: int) -> Any:
        return Forgetful(adapters)


class KeepsItsStrengthToItself(Right):
    """What the hook has set is an attribute of Python's and in no file."""

    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__(base, generator=generator)
        del self.strength
        self.strength = 1.0  # type: ignore[assignment]

    def added(self, x: Tensor) -> Tensor:
        A, B, C = (value.to(x.dtype) for value in (self.A, self.B, self.C))
        return SCALE * float(self.strength) * F.linear(F.linear(F.linear(x, A), C), B)


class PatchesItsBase(Right):
    """Its change stays in the base after it is removed."""

    def forward(self, base: Any, x: Tensor) -> Tensor:
        if "forward" not in vars(base):
            plain = base.forward
            base.forward = lambda x: plain(x) + self.added(x)
        found: Tensor = base(x)
        return found


class ComputesWithItsFirstSelf(Right):
    """A function made in the constructor holds the parameters of then: a copy's are not read."""

    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__(base, generator=generator)
        self.up = lambda z: z @ self.B.T.to(z.dtype)

    def added(self, x: Tensor) -> Tensor:
        A, C, c = (value.to(x.dtype) for value in (self.A, self.C, self.strength))
        return SCALE * c * self.up(F.linear(F.linear(x, A), C))
