"""Merging: a new model in which every wrapped call has become one dense weight, and what that cost."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.base import Adapted, NotMergeable, dense_weight
from lowrank.adapters.sites import adapted, sites
from lowrank.keys import key
from lowrank.quant.nf4 import NF4Linear

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class MergedSite:
    path: str
    change: float  # ‖W' − W‖ / ‖W‖
    rounding: float  # ‖stored − W'‖ / ‖W' − W‖: what the stored dtype lost of the change


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: a row a site, and the largest difference of the merged model's logits from the wrapped
    model's on a probe batch, beside the wrapped logits' own largest value (None where the model has none)."""

    sites: tuple[MergedSite, ...]
    logit_difference: float | None
    logit_scale: float | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"merged {len(self.sites)} sites"]
        if self.sites:
            change = sum(s.change for s in self.sites) / len(self.sites)
            worst = max(self.sites, key=lambda s: s.rounding)
            lines.append(f"mean change of a weight ‖W'−W‖/‖W‖ {change:.2e}")
            lines.append(f"lost to the stored dtype, worst site {worst.path}: {worst.rounding:.2e} of its change")
        if self.logit_difference is not None:
            lines.append(
                f"logits on a probe batch: max |merged − wrapped| {self.logit_difference:.2e} "
                f"(max |logit| {self.logit_scale:.1f})"
            )
        return "\n".join([*lines, *self.notes])


def merge(model: Model, probe: Tensor | None = None) -> tuple[Model, MergeReport]:
    """A new model without adapters that computes the same, and what merging cost; ``model`` is left as it is.

    Each wrapped site becomes a module of its base's own kind (an NF4 base becomes a dense ``nn.Linear`` in the
    model's dtype). ``probe`` (batch, seq) holds token ids to compare logits on; without it, keyed random ones.
    Raises NotMergeable, naming the site, where a method is not a change of weight and bias.
    """
    dtype = next((p.dtype for _, m in sites(model) for p in m.parameters(False) if p.is_floating_point()), None)
    memo: dict[int, Any] = {}
    rows = []
    for path, module in adapted(model):
        try:
            memo[id(module)], row = merged_site(path, module, dtype or torch.float32)
        except NotMergeable as error:
            raise NotMergeable(f"{path}: {error}") from None
        rows.append(row)
    result = copy.deepcopy(model, memo)  # deepcopy takes what the memo already holds: the merged sites
    result.requires_grad_(False)
    notes = untie(result)
    difference, scale = compare(model, result, probe)
    return result, MergeReport(tuple(rows), difference, scale, notes)


@torch.no_grad()
def merged_site(path: str, module: Adapted, dtype: torch.dtype) -> tuple[nn.Module, MergedSite]:
    base = module.base
    bias = getattr(base, "bias", None)
    before = dense_weight(base)  # (out, in)
    exact = torch.promote_types(before.dtype, torch.float32)
    wide = before.to(exact)
    weight, new_bias = module.adapter.merged(wide, None if bias is None else bias.to(exact))
    stored = dtype if isinstance(base, NF4Linear) else before.dtype
    kept = weight.to(stored)
    change = (weight - wide).norm()
    row = MergedSite(
        path,
        change=float(change / wide.norm().clamp_min(1e-30)),
        rounding=float((kept.to(exact) - weight).norm() / change.clamp_min(1e-30)) if change > 0 else 0.0,
    )
    return like(base, kept, new_bias), row


def like(base: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A module of the base's own kind that holds ``weight`` (out, in) and ``bias``."""
    if isinstance(base, NF4Linear):
        new: nn.Module = nn.Linear(base.in_features, base.out_features, bias=bias is not None, device="meta")
    else:
        new = copy.copy(base)
        for name, held in vars(base).items():  # a shallow copy shares them with the base: it gets its own
            if name == "_parameters":
                vars(new)[name] = dict(held)
            elif name.endswith("_hooks"):
                vars(new)[name] = type(held)()
        vars(new).pop("forward", None)  # a faster one is bound to the base
    values = weight.T if isinstance(base, (Conv1D, nn.Embedding)) else weight
    new._parameters["weight"] = nn.Parameter(values.contiguous().clone(), requires_grad=False)
    if bias is not None:
        new._parameters["bias"] = nn.Parameter(bias.to(weight.dtype).clone(), requires_grad=False)
    return new.train(base.training)


def untie(result: Any) -> tuple[str, ...]:
    """Two sites over one tensor: an adapter on one of them merges into that one alone, so the tie must end."""
    config = getattr(result, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return ()
    output, embedding = result.get_output_embeddings(), result.get_input_embeddings()
    if output is None or output.weight is embedding.weight:
        return ()
    config.tie_word_embeddings = False
    return ("the head and the embeddings shared one tensor and now differ: tie_word_embeddings is off",)


@torch.no_grad()
def compare(model: nn.Module, result: nn.Module, probe: Tensor | None) -> tuple[float | None, float | None]:
    config = getattr(model, "config", None)
    if config is None:
        return None, None
    if probe is None:
        probe = torch.randint(0, config.get_text_config().vocab_size, (2, 16), generator=key(0, "merge probe"))
    probe = probe.to(next(model.parameters()).device)
    with evaluating(model), evaluating(result):
        wrapped, merged = model(input_ids=probe).logits, result(input_ids=probe).logits
    return float((merged - wrapped).abs().max()), float(wrapped.abs().max())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
