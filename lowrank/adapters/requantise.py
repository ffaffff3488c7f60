"""Merging into NF4: which layers become NF4, and the rounding that carries the adapter, found on calibration tokens.

While the wrapped model runs over the tokens, each of its blocks, once it is done, has its counterpart in the merged
model run on what the merged blocks before it gave; a layer there is rounded when it is reached, so it sees the inputs
that it will see. With X (tokens, in) what the wrapped layer is given, X̂ what the merged one is, and W' (out, in) the
weight that the adapter makes, the layer's target is

    T = argmin ‖T X̂ᵀ − W' Xᵀ‖² + λ‖T − W'‖² = W' + W' (X − X̂)ᵀ X̂ (X̂ᵀX̂ + λ)⁻¹

(arXiv 2504.02692): it makes up for the rounding of the layers before it. ``lowrank.quant.rounding`` then finds codes
near T in the measure of X̂ᵀX̂. On SmolLM2-135M a third of the error is left that rounding each layer by itself leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.base import LINEAR, Adapted, NotMergeable, dense_weight
from lowrank.adapters.effect import evaluating, weight_before
from lowrank.adapters.kind import standing_for
from lowrank.adapters.sites import backbone, blocks, head, sites, walk
from lowrank.quant.nf4 import NF4Linear
from lowrank.quant.rounding import output_error, rounded, weights

RIDGE = 0.1  # λ, of the mean diagonal of X̂ᵀX̂
LARGE = 0.1  # a change, of the weight, from which scales of its own are tried beside those of the base


def places(model: nn.Module) -> set[str]:
    """Paths of the layers that are NF4 after the merge: those that are now; where none is, all linear ones but the
    head."""
    linear = {path: module for path, module in sites(model) if isinstance(module, (nn.Linear, Conv1D, NF4Linear))}
    already = {path for path, module in linear.items() if isinstance(module, NF4Linear)}
    output = head(model)
    return already or {path for path, module in linear.items() if module is not output}


def merged_parts(path: str, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias, fp32 at least, of the layer that computes what the site or bare layer ``path`` does.

    Raises NotMergeable, naming the site, where there is none.
    """
    base = module.base if isinstance(module, Adapted) else module
    if not isinstance(base, (*LINEAR, nn.Embedding)):
        what = type(module.adapter).__name__ if isinstance(module, Adapted) else "it"
        raise NotMergeable(f"{path}: {what} wraps a {type(base).__name__}, which has no weight to change")
    weight, bias = dense_weight(base), getattr(base, "bias", None)
    exact = torch.promote_types(weight.dtype, torch.float32)
    weight, bias = weight.to(exact), None if bias is None else bias.to(exact)
    try:
        return module.adapter.merged(weight, bias) if isinstance(module, Adapted) else (weight, bias)
    except NotMergeable as error:
        raise NotMergeable(f"{path}: {error}") from None


def begun(path: str, module: nn.Module, dtype: torch.dtype, method: str) -> NF4Linear:
    """The layer before calibration, its bias in ``dtype``. ``naive``: the merged weight, rounded under scales of its
    own. ``best``: codes and scales of what stood there before the adapter, if that is NF4."""
    weight, bias = merged_parts(path, module)
    bias = None if bias is None else bias.detach().to(dtype, copy=True)
    base, original = (module.base, module.original) if isinstance(module, Adapted) else (module, module)
    if method == "best" and isinstance(original, NF4Linear):
        layer = original.twin(bias)
    else:
        double = base.double_quantized if isinstance(base, NF4Linear) else True
        compute = base.compute_dtype if isinstance(base, NF4Linear) else None
        layer = NF4Linear.from_dense(weight, bias, double=double, compute_dtype=compute)
    standing_for(base, layer)
    return layer


@dataclass(frozen=True)
class Inputs:
    """Of what some layers of the merged model are given, and their counterparts in the wrapped one."""

    x: Tensor  # X̂ as it came, (…, in)
    moment: Tensor  # X̂ᵀX̂, (in, in) fp32
    correction: Tensor | None  # C (in, in) with T = W' + W' C

    @classmethod
    def of(cls, x: Tensor, wrapped: Tensor) -> Inputs:
        rows = x.flatten(0, -2).float()  # (tokens, in)
        moment = rows.T @ rows
        if wrapped is x or wrapped.shape != x.shape:  # other tokens (experts): nothing to compare
            return cls(x, moment, None)
        cross = rows.T @ (wrapped.flatten(0, -2).float() - rows)  # (in, in)
        ridge = (RIDGE * moment.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
        eye = torch.eye(len(moment), device=moment.device)
        return cls(x, moment, torch.linalg.solve(moment + ridge * eye, cross).T)


@dataclass
class Calibration:
    """Rounds layers of ``result`` while ``model`` runs: ``wanted`` holds the wrapped sites, or bare layers, by path.

    ``shares`` says of each one that was reached what share of the change that its output needed its codes carry.
    """

    model: nn.Module
    result: nn.Module
    wanted: dict[str, nn.Module]
    shares: dict[str, float] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)  # to the wrapped layers of the block that runs
    streams: tuple[Any, Any] | None = None  # what the last block gave, in either model
    inputs: Inputs | None = None  # the last ones: q, k and v share theirs

    @torch.no_grad()
    def run(self, tokens: Tensor) -> dict[str, float]:
        """Over ``tokens`` (rows, width) at once: what one block's layers are given is held in memory."""
        trunk = backbone(self.model)
        runner = self.model if trunk is None else dict(walk(self.model))[trunk]
        options = {"use_cache": False} if hasattr(self.model, "config") else {}
        handles = self.watch()
        try:
            with evaluating(self.model), evaluating(self.result):
                runner(tokens.to(next(self.model.parameters()).device), **options)
        finally:
            for handle in handles:
                handle.remove()
        return self.shares

    def watch(self) -> list[Any]:
        """The hooks: before a layer, in either model; and after a block, or after a layer that is in none."""
        here, there = dict(walk(self.model)), dict(walk(self.result))
        units = blocks(self.model)
        touched = [n for n, path in enumerate(units) if any(site.startswith(f"{path}.") for site in self.wanted)]
        units = units[touched[0] : touched[-1] + 1] if touched else []  # those between carry the stream
        units += [site for site in self.wanted if not any(site.startswith(f"{path}.") for path in units)]
        before = [here[path].register_forward_pre_hook(self.noting(path)) for path in self.wanted]
        before += [there[path].register_forward_pre_hook(self.rounding(path)) for path in self.wanted]
        return before + [
            here[path].register_forward_hook(self.following(there[path]), with_kwargs=True) for path in units
        ]

    def noting(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.given.setdefault(path, args[0])

        return note

    def following(self, counterpart: nn.Module) -> Callable[..., None]:
        """After a block of the wrapped model: the merged model's, on what the one before it gave."""

        def follow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = args[:1]
            if self.streams is not None and args and args[0] is self.streams[0]:
                hidden = (self.streams[1],)
            self.streams = (first(output), first(counterpart(*hidden, *args[1:], **kwargs)))
            self.given.clear()

        return follow

    def rounding(self, path: str) -> Callable[..., None]:
        def round_(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if path not in self.shares and path in self.given:
                assert isinstance(layer, NF4Linear)
                if self.inputs is None or self.inputs.x is not args[0]:
                    self.inputs = Inputs.of(args[0], self.given[path])
                self.shares[path] = recode(layer, path, self.wanted[path], self.inputs)

        return round_


def recode(layer: NF4Linear, path: str, module: nn.Module, inputs: Inputs) -> float:
    """Gives ``layer`` the codes that come nearest to what ``module`` computes. Returns the share that they carry of
    what had to change in its output, 1 where nothing had to: 1 − ‖(Q − T) X̂ᵀ‖ / ‖(W − T) X̂ᵀ‖."""
    target = merged_parts(path, module)[0].float()  # (out, in)
    if inputs.correction is not None:
        target = target + target @ inputs.correction
    before = weight_before(module).float() if isinstance(module, Adapted) else dense_weight(module).float()
    tried = [attempt(layer.twin(None), target, inputs.moment)]
    if (target - before).norm() > LARGE * before.norm():  # W's scales may not reach as far
        tried.append(attempt(layer.twin(None).fill(target), target, inputs.moment))
    lost, best = min(tried, key=lambda pair: pair[0])
    layer.adopt(best)
    change = float(output_error(before - target, inputs.moment).sum())
    return 1 - math.sqrt(lost / change) if change > 0 else 1.0


def attempt(layer: NF4Linear, target: Tensor, moment: Tensor) -> tuple[float, NF4Linear]:
    """The layer with the best codes under its scales, and the error of its output."""
    scales = layer.scales()
    codes = rounded(target, scales, moment, layer.codes())
    return float(output_error(weights(codes, scales) - target, moment).sum()), layer.recode(codes)


def first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
