"""One memory for all that the optimizer touches: a step is one kernel over it, whatever the number of tensors.

An optimizer that goes entry by entry makes the same of a thousand tensors as of one that holds them end to end. So the
values of a group's parameters are moved into one tensor, and their gradients and the optimizer's state lie in others;
parameters stay who they are, by name, and what they, their gradients and their states hold are views.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.train import finite
from lowrank.train.update import called, follow, named, options, shortens, twin

ELEMENTWISE = (
    *(torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.Adamax, torch.optim.AdamW),
    *(torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD),
)
OF_ALL = ("step", "mu_product", "eta", "mu")  # of their state: one number a parameter, the rest is of its shape
LARGE = 1 << 28  # bytes of parameters: their kernels are long enough, and gradients are not kept through the forward
ALIGN = 64  # bytes, as torch's allocator on a CPU aligns: products see no other addresses than they did
ROW = 1024  # entries whose squares are summed first: one sum over millions in fp32 is wrong in its fourth digit


def why_not(optimizer: torch.optim.Optimizer) -> str | None:
    """What keeps an optimizer's parameters from one memory, or None."""
    parameters = list(named(optimizer).values())
    if type(optimizer) not in ELEMENTWISE:
        return "not entry by entry"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "it is to be differentiated"
    on_cpu = any(p.device.type == "cpu" for p in parameters)
    if on_cpu and not all(group.get("fused") for group in optimizer.param_groups):
        return "no fused kernel, and small tensors stay in a CPU's cache"
    if sum(p.nbytes for p in parameters) > LARGE:
        return f"{sum(p.nbytes for p in parameters) / 1e6:,.0f} MB train"
    if not all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in parameters):
        return "a tensor that trains shares its memory with others"
    return None


class Stretch:
    """Parameters of one dtype and device, end to end in ``flat``, and ``grad``, their gradients."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        first, self.parameters = parameters[0], list(parameters)
        unit, end = ALIGN // first.element_size(), 0
        self.starts: list[int] = []
        for parameter in parameters:
            self.starts.append(end)
            end += -(-parameter.numel() // unit) * unit
        entries = -(-end // ROW) * ROW
        self.flat = nn.Parameter(torch.zeros(entries, dtype=first.dtype, device=first.device))
        self.grad = self.flat.grad = torch.zeros_like(self.flat.detach())
        self.values, self.grads = self.views(self.flat.detach()), self.views(self.grad)
        self.addresses = [value.data_ptr() for value in self.values]
        self.bind()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Of a tensor laid out as ``flat``, each parameter's part in its shape."""
        placed = zip(self.starts, self.parameters, strict=True)
        return [flat[start : start + p.numel()].view(p.shape) for start, p in placed]

    def bind(self) -> None:
        """Moves into the memory what is not there: a parameter's values, where they were given another memory."""
        for p, value, address in zip(self.parameters, self.values, self.addresses, strict=True):
            if p.data_ptr() != address:
                p.data = value.copy_(p.detach())

    def gather(self) -> bool:
        """Moves gradients into the memory; one that is None stays so, and counts as zero. Whether none is None."""
        given = [p.grad for p in self.parameters]
        placed = list(zip(self.parameters, self.grads, given, strict=True))
        away = [(p, place, grad) for p, place, grad in placed if grad is not None and grad is not place]
        if away:
            torch._foreach_copy_([place for _, place, _ in away], [grad for _, _, grad in away])
        for p, place, _ in away:
            p.grad = place
        for _, place, grad in placed:
            if grad is None:
                place.zero_()
        return all(grad is not None for grad in given)

    def release(self) -> None:
        for p in self.parameters:
            p.grad, p.data = None, p.detach().clone()


class Flat:
    """Steps once over each group's memory. A parameter without a gradient is left alone by torch's optimizers: where
    there is one, or where one has missed a step before and its count is behind, the optimizer itself goes a parameter
    at a time over the same memory, and ``say`` is told.

    ``optimizer`` stays the one of the named groups: learning rates are read off them, and its state is, at any time,
    that of each parameter, in views of the memory.
    """

    at_once = False

    def __init__(self, optimizer: torch.optim.Optimizer, say: Callable[[str], None] = lambda line: None) -> None:
        self.optimizer, self.say, self.told = optimizer, say, False
        self.parameters = named(optimizer)
        made = [(group, stretches(group["params"])) for group in optimizer.param_groups]
        self.stretches = [stretch for _, found in made for stretch in found]
        groups = [{**options(group), "params": [one.flat for one in found]} for group, found in made]
        self.whole = twin(optimizer, groups, defaultdict(dict))
        self.aliases: list[dict[str, list[Tensor]]] = [{} for _ in self.stretches]  # each parameter's state

    def __str__(self) -> str:
        return f"optimizer flat ({called(self.optimizer)}: {len(self.parameters)} tensors in {len(self.stretches)})"

    def clear(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def gathered(self) -> torch.optim.Optimizer:
        for stretch in self.stretches:
            stretch.gather()
        return self.whole

    def norm(self) -> Tensor:
        return norm_of([stretch.grad for stretch in self.stretches])

    def clip(self, max_norm: float, norm: Tensor, length: float) -> None:
        if shortens(max_norm, length):
            coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            for stretch in self.stretches:
                stretch.grad.mul_(coefficient.to(stretch.grad.device))

    def step(self) -> None:
        for stretch in self.stretches:
            stretch.bind()
        complete = [stretch.gather() for stretch in self.stretches]  # hooks may have given other gradients
        if all(complete) and all(self.joined(n) for n in range(len(self.stretches))):
            follow(self.whole.param_groups, self.optimizer.param_groups)
            self.whole.step()
            self.share()
            torch.autograd.graph.increment_version(list(self.parameters.values()))
        else:
            self.part()
            self.optimizer.step()

    def size(self) -> Tensor:
        return norm_of([stretch.flat.detach() for stretch in self.stretches])

    def bad(self) -> dict[str, str]:
        return finite.bad(finite.gradients(self.parameters))

    def release(self) -> None:
        """Training is over: every parameter has a memory of its own again."""
        for stretch in self.stretches:
            stretch.release()

    def joined(self, number: int) -> bool:
        """Whether the state of a stretch's parameters is that of its memory; it is made so where that can be."""
        stretch, shared = self.stretches[number], self.aliases[number].items()
        held = [self.optimizer.state.get(p, {}) for p in stretch.parameters]
        if all(len(one) == len(shared) for one in held) and all(
            one[what] is alias for what, aliases in shared for one, alias in zip(held, aliases, strict=True)
        ):
            return True
        if not alike(held):
            return False
        before = self.whole.state.pop(stretch.flat, {})
        for what, first in held[0].items():
            if what in OF_ALL:
                value = first.clone()
            else:
                value = before[what] if what in before else torch.zeros_like(stretch.grad, dtype=first.dtype)
                for place, one in zip(stretch.views(value), held, strict=True):
                    place.copy_(one[what])
            self.whole.state[stretch.flat][what] = value
        self.aliases[number] = {}
        self.share()
        return True

    def share(self) -> None:
        """Every parameter's state becomes a view of the whole one, where it is not yet."""
        for stretch, known in zip(self.stretches, self.aliases, strict=True):
            for what, value in self.whole.state.get(stretch.flat, {}).items():
                if what in known and known[what][0].data_ptr() == value.data_ptr():
                    continue
                of_all = what in OF_ALL
                known[what] = [value.view(()) for _ in stretch.parameters] if of_all else stretch.views(value)
                for p, alias in zip(stretch.parameters, known[what], strict=True):
                    self.optimizer.state[p][what] = alias

    def part(self) -> None:
        """Before a step of each parameter: what is one number for all of them becomes one of each."""
        if not self.told:
            self.say("optimizer: not every tensor that trains had a gradient: such steps go a parameter at a time")
            self.told = True
        for stretch, known in zip(self.stretches, self.aliases, strict=True):
            for what in [what for what in known if what in OF_ALL]:
                for p, alias in zip(stretch.parameters, known[what], strict=True):
                    if self.optimizer.state[p].get(what) is alias:
                        self.optimizer.state[p][what] = alias.clone()


def stretches(parameters: Sequence[nn.Parameter]) -> list[Stretch]:
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    return [Stretch(alike) for alike in kinds.values()]


def alike(states: Sequence[dict[str, Any]]) -> bool:
    """Whether parameters have the same kinds of state, and the same numbers in it: the step they are at."""
    if any(one.keys() != states[0].keys() for one in states):
        return False
    for what in states[0].keys() & set(OF_ALL):
        numbers = torch.stack([one[what] for one in states])
        if not bool((numbers == numbers[0]).all()):
            return False
    return True


def norm_of(flats: Sequence[Tensor]) -> Tensor:
    """√Σx² over tensors of whole rows, in fp32 or wider."""
    rows = list(rows_of(flats))
    return torch.linalg.vector_norm(torch.cat([row.to(rows[0].device) for row in rows]))


def rows_of(flats: Sequence[Tensor]) -> Iterator[Tensor]:
    for flat in flats:
        wide = torch.promote_types(flat.dtype, torch.float32)
        yield torch.linalg.vector_norm(flat.view(-1, ROW), dim=1, dtype=wide)
