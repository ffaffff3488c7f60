"""AdaLoRA's rank allocator (arXiv 2303.10512, sections 3.2 and 3.3): which triplets of which site stay, and when."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError


class Triplets(Protocol):
    """A site's r triplets (B[:, i], E[i], A[i])."""

    A: nn.Parameter  # (r, in)
    E: nn.Parameter  # (r,)
    B: nn.Parameter  # (out, r)


@dataclass(frozen=True)
class Schedule:
    """b(t), how many triplets all sites together keep after step t, of a run of steps 1 … ``steps``.

    With t_i = ``first`` and T − t_f = ``last`` (section 3.3, as the authors' code has it; the paper's own formula
    takes t_f from t once too often and would begin above b₀):

        b(t) = b₀                                               t ≤ t_i
               b_T + (b₀ − b_T)·(1 − (t − t_i)/(T − t_i − t_f))³    between, rounded down
               b_T                                              t ≥ T − t_f
    """

    steps: int
    first: int
    last: int
    every: int
    start: int  # b₀
    end: int  # b_T

    @classmethod
    def of(cls, steps: int, parts: tuple[float, float], every: int | None, *, start: int, end: int) -> Schedule:
        """For the first and the last part of a run, as fractions of it. Raises ConfigError where ``every`` is longer
        than what is between them; None is a twentieth of that."""
        first = int(parts[0] * steps)  # both parts are rounded down: a run of any length has something between them
        last = max(first + 1, steps - int(parts[1] * steps))
        if every is not None and every > last - first:
            raise ConfigError(
                f"adapter.delta_t: {every} is not allowed; of this run's {steps} steps the ranks change in "
                f"{first + 1} to {last}: at most {last - first}, or null."
            )
        return cls(steps, first, last, every or math.ceil((last - first) / 20), start, end)

    def budget(self, step: int) -> int:
        window = self.last - self.first
        left = min(max(self.last - step, 0), window)
        return self.end + (self.start - self.end) * left**3 // window**3  # in integers: exact

    def due(self, step: int) -> bool:
        """Whether step ``step`` reallocates: every ΔT steps after t_i, and once more at T − t_f."""
        return step == self.last or (self.first < step < self.last and (step - self.first) % self.every == 0)


class RankAllocator:
    """Gives b(t) to the most important triplets of all its sites, and sets E of the others to zero.

    Importance of an entry w is |w·∂L/∂w|, smoothed (Ī, with beta1), and how much that varies (Ū, with beta2);
    s = Ī·Ū, and a triplet's score is s(E) + the mean of s over its row of A + the mean over its column of B. The
    gradient is the step's whole one, penalty included and clipped; one factor for all entries moves no order within
    a step.

    Between two reallocations E moves freely, so a triplet that lost its place may win it back at the next (section
    3.2). From T − t_f on the choice stands and E of the others is zero after every step. Ties go to the earlier
    site: the number of triplets that stay is b(t) whatever the scores are.
    """

    def __init__(self, adapters: Mapping[str, Triplets], schedule: Schedule, beta1: float, beta2: float) -> None:
        self.adapters, self.schedule, self.beta1, self.beta2 = adapters, schedule, beta1, beta2
        self.importance = {name: torch.zeros_like(p) for name, p in self.entries()}  # Ī
        self.uncertainty = {name: torch.zeros_like(p) for name, p in self.entries()}  # Ū
        first = next(iter(adapters.values())).E
        self.pruned = torch.zeros(len(adapters), len(first), dtype=torch.bool, device=first.device)  # (sites, r)
        self.left = self.pruned.numel()  # triplets that have their place
        self.allocated = 0  # the step that last reallocated

    def entries(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, adapter in self.adapters.items():
            yield from ((f"{path}.A", adapter.A), (f"{path}.E", adapter.E), (f"{path}.B", adapter.B))

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        late = step > self.schedule.last
        if late and self.left == self.schedule.end:
            return
        for name, parameter in self.entries():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            now = torch.mul(parameter, grad).abs_()
            self.importance[name].lerp_(now, 1 - self.beta1)
            self.uncertainty[name].lerp_(now.sub_(self.importance[name]).abs_(), 1 - self.beta2)
        if late or self.schedule.due(step):  # late: a resumed run that was made shorter
            self.allocate(step)

    def allocate(self, step: int) -> None:
        budget = self.schedule.budget(step)
        order = self.scores().flatten().argsort(descending=True, stable=True)  # (sites · r)
        self.pruned.view(-1).fill_(True).index_fill_(0, order[:budget], False)
        self.left, self.allocated = budget, step

    def scores(self) -> Tensor:
        """Of every triplet: (sites, r)."""
        s = {name: self.importance[name] * self.uncertainty[name] for name, _ in self.entries()}
        return torch.stack([s[f"{p}.E"] + s[f"{p}.A"].mean(1) + s[f"{p}.B"].mean(0) for p in self.adapters])

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        if step == self.allocated or step >= self.schedule.last:
            for adapter, pruned in zip(self.adapters.values(), self.pruned, strict=True):
                adapter.E.masked_fill_(pruned, 0.0)

    def after_step(self, record: Any) -> None:
        """Nothing of its own to do."""

    def ranks(self) -> dict[str, int]:
        """How many triplets each site kept at the last reallocation."""
        return dict(zip(self.adapters, (~self.pruned).sum(1).tolist(), strict=True))

    def event(self, step: int) -> dict[str, Any] | None:
        """What metrics.jsonl holds of a step: every site's rank, at the start, after a reallocation, at the end."""
        telling = step in (1, self.allocated, self.schedule.steps)
        return {"event": "ranks", "ranks": self.ranks()} if telling else None

    def state_dict(self) -> dict[str, Any]:
        importance = {f"importance.{name}": value for name, value in self.importance.items()}
        return (
            importance
            | {f"uncertainty.{name}": value for name, value in self.uncertainty.items()}
            | {"pruned": self.pruned}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.state_dict()
        if own.keys() != state.keys():
            raise ValueError(f"not the state of these sites: {sorted(own.keys() ^ state.keys())[0]}")
        for name, value in own.items():
            value.copy_(state[name])
        self.left = self.pruned.numel() - int(self.pruned.sum())
