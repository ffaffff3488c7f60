"""The run's model on tensors without values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank import assemble
from lowrank.adapters.inject import apply
from lowrank.adapters.sites import adapted, blocks, kinds, sites
from lowrank.assemble import Parts
from lowrank.fast import linear
from lowrank.models import attention
from lowrank.models import load as models
from lowrank.quant.convert import quantize

SHORT = 2  # blocks of a run of them that is cut
OWN = ("group", "layer_idx", "layer_id", "layer_number")  # what blocks that cost the same may differ in


@dataclass(frozen=True)
class Bare:
    """``runs`` are the numbers of blocks alike, one after another."""

    model: Any
    mode: FakeTensorMode
    runs: tuple[int, ...]
    packed: bool

    @property
    def short(self) -> tuple[int, ...]:
        """The fewest blocks of each run that tell what all of them take: a first, a last and none between; all of them
        where an adapter around the decoder counts them."""
        kind = kinds(self.model)
        whole = any(kind[path] == "backbone" for path, _ in adapted(self.model))
        return self.runs if whole else tuple(min(count, SHORT) for count in self.runs)

    @contextmanager
    def only(self, kept: Sequence[int]) -> Iterator[None]:
        """Inside, the model has the first so many blocks of each run."""
        paths, config = blocks(self.model), self.model.config.get_text_config()
        if not paths:
            yield
            return
        parent, _, name = paths[0].rpartition(".")[0].rpartition(".")
        holder: Any = dict(sites(self.model))[parent]
        whole, deep = getattr(holder, name), config.num_hidden_layers
        firsts = [sum(self.runs[:i]) for i in range(len(self.runs))]
        chosen = [whole[first + i] for first, few in zip(firsts, kept, strict=True) for i in range(few)]
        setattr(holder, name, nn.ModuleList(chosen))
        config.num_hidden_layers = len(chosen)
        try:
            yield
        finally:
            setattr(holder, name, whole)
            config.num_hidden_layers = deep


def plain(parts: Parts) -> Any:
    """The model of a run on the meta device, its adapters on it, all blocks."""
    config = parts.config
    bare = models.skeleton(config.model, parts.dtype)
    if config.quant.kind == "nf4":
        bare = quantize(bare, **assemble.quant_options(config))
    with torch.device("meta"):  # made there at once, what adapters share stays one
        return apply(bare, parts.plan, keep_base=False)


def lengths(model: nn.Module) -> tuple[int, ...]:
    """The numbers of blocks alike, one after another."""
    known: dict[str, Any] = dict(sites(model))
    runs: list[int] = []
    before: Any = None
    for path in blocks(model):
        this = looks(known[path])
        runs = [*runs[:-1], runs[-1] + 1] if this == before else [*runs, 1]
        before = this
    return tuple(runs)


def looks(block: nn.Module) -> list[Any]:
    """All that a block's cost depends on."""
    found: list[Any] = []
    for name, module in block.named_modules():
        simple = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str)) and k not in OWN}
        own = [(key, t.shape, t.dtype, t.requires_grad) for key, t in held(module)]
        found.append((name, type(module), {k: v for k, v in simple.items() if k[:1] != "_"}, own))
    return found


def held(module: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = {**module._parameters, **module._buffers}
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def on_device(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Every tensor of a meta model as one that says it is on ``device`` and holds no value, in place."""
    made: dict[int, Tensor] = {}
    there = [*model.parameters(), *model.buffers()]  # as long as they live, no other has their place

    def twin(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            train = tensor.requires_grad
            made[id(tensor)] = nn.Parameter(new, train) if isinstance(tensor, nn.Parameter) else new
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = twin(tensor)  # type: ignore[assignment]
    del there


def build(parts: Parts) -> Bare:
    """As it is before the pre-flight: its layers' products those of this machine, its blocks plain."""
    model = plain(parts)
    runs = lengths(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    on_device(model, mode, parts.device)
    own = model.config._attn_implementation
    packed = attention.install(model) is None
    if not packed:
        model.set_attn_implementation(own)
    if parts.config.loop.fast:
        linear.fuse(model)
    return Bare(model, mode, runs, packed)
