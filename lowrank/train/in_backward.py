"""The optimizer inside the backward pass: a parameter moves as soon as its gradient is whole, which is then gone.

So of all gradients only one is there at a time, and full fine-tuning needs no memory for them (LOMO, arXiv 2306.09782;
here for any optimizer that looks at one parameter at a time). What it cannot have is whatever needs all of them before
the first parameter moves: a norm to clip at, several micro-batches, a loss scale, and a way back.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError
from lowrank.train.finite import kind
from lowrank.train.flat import ELEMENTWISE
from lowrank.train.update import called, named, options, twin

ALONE = (*ELEMENTWISE, torch.optim.Adafactor, torch.optim.Muon)


def refuse(cls: type) -> None:
    """Raises ConfigError for an optimizer that may look at several parameters together."""
    if cls not in ALONE and not cls.__module__.startswith("bitsandbytes."):
        names = ", ".join(sorted(one.__name__ for one in ALONE))
        raise ConfigError(
            f"optim.in_backward: {cls.__name__} is not known to move each parameter by itself. Of torch.optim "
            f"{names} do, and those of bitsandbytes. Choose one of them, or optim.in_backward=false."
        )


class InBackward:
    """Each parameter has the optimizer to itself, when backward comes to it, over the one state of the named groups.

    A gradient is looked at before its parameter moves. One that is not finite moves nothing, but the parameters that
    backward had come to before have moved.
    """

    at_once = True

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        refuse(type(optimizer))
        self.optimizer, self.parameters = optimizer, named(optimizer)
        self.lengths: dict[str, Tensor] = {}  # of this step's gradients, in the order in which they came
        self.handles: list[Any] = []
        for group in optimizer.param_groups:
            alone = twin(optimizer, [{**options(group), "params": []}], optimizer.state)
            for name, parameter in zip(group["names"], group["params"], strict=True):
                move = partial(self.move, name, group, alone)
                self.handles.append(parameter.register_post_accumulate_grad_hook(move))

    def __str__(self) -> str:
        return f"optimizer in backward ({called(self.optimizer)})"

    @torch.no_grad()
    def move(self, name: str, group: dict[str, Any], alone: Any, parameter: nn.Parameter) -> None:
        """The parameter's gradient is whole: it moves, and the gradient is gone. Raises ConfigError at a second one."""
        assert parameter.grad is not None
        if name in self.lengths:
            raise ConfigError(
                f"optim.in_backward: {name} had a second gradient in a step, and has moved by its first: of another "
                "micro-batch, or of recomputed blocks that share it. Set optim.in_backward=false."
            )
        self.lengths[name] = length = nn.utils.get_total_norm([parameter.grad])
        alone.param_groups[0].update(options(group), params=[parameter])
        if group.get("fused"):
            alone.grad_scale, alone.found_inf = (
                None,
                (~torch.isfinite(length)).float(),
            )  # such a kernel then does nothing
            alone.step()
        elif math.isfinite(length):
            alone.step()
        parameter.grad = None

    def clear(self) -> None:
        self.lengths.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def gathered(self) -> torch.optim.Optimizer:
        return self.optimizer

    def norm(self) -> Tensor:
        return nn.utils.get_total_norm(list(self.lengths.values()))

    def clip(self, max_norm: float, norm: Tensor, length: float) -> None:
        assert max_norm == math.inf, "parameters have moved: there is nothing left to clip"

    def step(self) -> None:
        """Is made."""

    def size(self) -> Tensor:
        return nn.utils.get_total_norm([p.detach() for p in self.parameters.values()])

    def release(self) -> None:
        """Nothing of the run is left on the parameters."""
        for handle in self.handles:
            handle.remove()

    def bad(self) -> dict[str, str]:
        return {name: found for name, length in reversed(self.lengths.items()) if (found := kind(length))}
