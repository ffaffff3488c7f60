"""Merging: a new model in which every wrapped call has become one weight, and what that cost."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank.adapters.bank import Bank
from lowrank.adapters.base import LINEAR, Adapted, dense_weight
from lowrank.adapters.effect import Kept, Tokens, kept, random_tokens, refuse_unknown_ids, table, weight_before
from lowrank.adapters.kind import like, standing_for
from lowrank.adapters.requantise import Calibration, begun, merged_parts, places
from lowrank.adapters.sites import TRAINED, adapted, replace, sites, walk
from lowrank.errors import ConfigError, RefusedError, did_you_mean
from lowrank.quant.nf4 import NF4Linear

Model = TypeVar("Model", bound=nn.Module)

KINDS, METHODS = ("dense", "nf4"), ("naive", "best")


@dataclass(frozen=True)
class MergedSite:
    path: str
    change: float  # ‖W' − W‖ / ‖W‖
    rounding: float  # ‖stored − W'‖ / ‖W' − W‖: what the stored numbers lost of the change, weight by weight
    flipped: float | None = None  # the share of 4-bit codes that are not the base's; None unless both are NF4
    share: float | None = None  # of the change that its output needed on the calibration tokens, what the codes carry


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: a row a site, and how the merged model's logits compare on the probe (``lowrank.merge``).

    ``share`` and the three figures behind it are None where they cannot be known.
    """

    sites: tuple[MergedSite, ...]
    share: float | None  # 1 − ‖merged − wrapped‖ / ‖wrapped − base‖
    effect: float | None  # ‖wrapped − base‖ / ‖wrapped‖
    logit_difference: float | None  # max |merged − wrapped|
    logit_scale: float | None  # max |wrapped|
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"merged {len(self.sites)} sites"]
        if self.sites:
            change = sum(s.change for s in self.sites) / len(self.sites)
            worst = max(self.sites, key=lambda s: s.rounding)
            lines.append(f"mean change of a weight ‖W'−W‖/‖W‖ {change:.2e}")
            lines.append(f"lost to the stored numbers, worst site {worst.path}: {worst.rounding:.2e} of its change")
        flipped = [s.flipped for s in self.sites if s.flipped is not None]
        if flipped:
            lines.append(f"4-bit codes that changed: {sum(flipped) / len(flipped):.2%}")
        if self.logit_difference is not None:
            lines.append(
                f"logits on a probe batch: max |merged − wrapped| {self.logit_difference:.2e} "
                f"(max |logit| {self.logit_scale:.1f})"
            )
        if self.share is not None:
            lines.append(
                f"share of the adapter's effect that survives there: {self.share:.3f} "
                f"(the effect is {self.effect:.1%} of the logits)"
            )
        return "\n".join([*lines, *self.notes])


def merge(
    model: Model,
    to: str = "dense",
    method: str = "best",
    min_share: float | None = 0.5,
    probe: Tokens | None = None,
    calibration: Tokens | None = None,
) -> tuple[Model, MergeReport]:
    """A new model without adapters that computes the same, and what merging cost; ``model`` is left as it is.

    ``dense``: each wrapped site becomes a module of its base's own kind (an NF4 base a dense ``nn.Linear`` in the
    model's dtype): exact but for the rounding of that dtype, which in bf16 can be as large as the change. ``nf4``: the
    layers that are NF4, or all linear ones but the head where none is, are NF4 again; other sites merge dense.
    ``method`` is how: ``naive`` rounds the merged weight as quantising does, which loses a small adapter; ``best``
    chooses the codes that keep the layers' outputs on ``calibration`` (see ``lowrank.adapters.requantise``).

    The report's ``share`` is 1 − ‖merged − wrapped‖ / ‖wrapped − base‖ over all logits on ``probe``, 1 where the
    adapters have no effect. ``probe`` and ``calibration`` are token ids, (rows, width) or rows of them. Without a
    probe it is keyed random tokens, of which no trained adapter was made; without ``calibration`` it is the probe,
    and the share is then measured on the very tokens that it was fitted to.

    Raises RefusedError where the share is below ``min_share`` or, in NF4, cannot be measured (0 or None: merge all
    the same); NotMergeable, naming the site, where a method is not a change of weight and bias; ConfigError where an
    argument is none of the above.
    """
    refuse_unknown(to, method, min_share)
    if any(site.bypassed for _, site in adapted(model)):
        raise ConfigError("merge: the adapters are disabled here; merge them outside of lowrank.disable.")
    config = getattr(model, "config", None)
    probe = random_tokens(config) if probe is None and config is not None else probe
    asked = None if probe is None else table(probe)
    fitted = asked if calibration is None else table(calibration)
    for ids in (asked, fitted):
        refuse_unknown_ids(model, ids)
    result, rows, notes = requantised(model, method, fitted) if to == "nf4" else dense(model)
    vars(result).pop(TRAINED, None)
    notes += untie(result)
    found = None if config is None or asked is None else kept(model, result, asked)
    report = MergeReport(rows, *figures(found), notes)
    refuse_lost(report, to, min_share)
    return result, report


def figures(found: Kept | None) -> tuple[float | None, float | None, float | None, float | None]:
    return (None, None, None, None) if found is None else (found.share, found.effect, found.difference, found.scale)


@torch.no_grad()
def dense(model: Model) -> tuple[Model, tuple[MergedSite, ...], tuple[str, ...]]:
    dtype, wrapped = model_dtype(model), in_use(model)
    made = {path: plain(path, site, dtype) for path, site in wrapped.items()}
    return copied(model, made), tuple(row(path, wrapped[path], new) for path, new in made.items()), ()


@torch.no_grad()
def requantised(
    model: Model, method: str, calibration: Tensor | None
) -> tuple[Model, tuple[MergedSite, ...], tuple[str, ...]]:
    """The model with its NF4 layers rounded anew, and its other sites dense."""
    if method == "best" and calibration is None:
        raise ConfigError("merge: method=best needs token ids to calibrate on (calibration=…); or choose method=naive.")
    dtype, chosen, wrapped = model_dtype(model), places(model), in_use(model)
    wanted = {path: m for path, m in walk(model) if path in chosen and not isinstance(m, NF4Linear)}
    quantised = {path: begun(path, module, dtype, method) for path, module in wanted.items()}
    others = {path: plain(path, site, dtype) for path, site in wrapped.items() if path not in chosen}
    made: dict[str, nn.Module] = {**quantised, **others}
    result, shares = copied(model, made), dict[str, float]()
    notes: tuple[str, ...] = ()
    if method == "best" and calibration is not None:
        shares = Calibration(model, result, wanted).run(calibration)
        missed = wanted.keys() - shares.keys()
        for path in missed:
            quantised[path].fill(merged_parts(path, wanted[path])[0])
        notes = (f"no calibration token reaches {len(missed)} layers: rounded naively",) if missed else ()
    return result, tuple(row(path, site, made[path], shares.get(path)) for path, site in wrapped.items()), notes


def in_use(model: nn.Module) -> dict[str, Adapted]:
    """The sites to merge: all but a block's or backbone's bank of which no adapter is chosen."""
    return {
        path: site
        for path, site in adapted(model)
        if isinstance(site.base, (*LINEAR, nn.Embedding))
        or not isinstance(site.adapter, Bank)
        or site.adapter.chosen() is not None
    }


def model_dtype(model: nn.Module) -> torch.dtype:
    floats = (p.dtype for _, m in sites(model) for p in m.parameters(False) if p.is_floating_point())
    return next(floats, torch.float32)


def plain(path: str, site: Adapted, dtype: torch.dtype) -> nn.Module:
    """The merged layer of the base's own kind, in its dtype; an NF4 base's is an ``nn.Linear`` in ``dtype``."""
    weight, bias = merged_parts(path, site)
    base = site.base
    stored = dtype if isinstance(base, NF4Linear) else dense_weight(base).dtype
    weight, bias = weight.to(stored), None if bias is None else bias.to(stored)
    if not isinstance(base, NF4Linear):
        return like(base, weight, bias)
    new = nn.Linear(base.in_features, base.out_features, bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.clone(), requires_grad=False)
    new.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone(), requires_grad=False))
    return standing_for(base, new)


def copied(model: Model, made: dict[str, nn.Module]) -> Model:
    """A frozen copy of the model with the modules of ``made`` at their paths."""
    here = dict(walk(model))
    memo: dict[int, Any] = {id(here[path]): module for path, module in made.items()}
    result = copy.deepcopy(model, memo)  # deepcopy takes what the memo already holds
    for path, site in reversed(list(adapted(result))):  # banks that are not in use
        replace(result, path, site.base)
    result.requires_grad_(False)
    return result


def row(path: str, site: Adapted, new: nn.Module, share: float | None = None) -> MergedSite:
    merged, _ = merged_parts(path, site)  # (out, in)
    before, stored = weight_before(site).to(merged.dtype), dense_weight(new).to(merged.dtype)
    change, lost = (merged - before).norm(), (stored - merged).norm()
    flipped = None
    if isinstance(site.original, NF4Linear) and isinstance(new, NF4Linear):
        flipped = float((site.original.codes() != new.codes()).float().mean())
    return MergedSite(
        path,
        change=float(change / before.norm().clamp_min(1e-30)),
        rounding=float(lost / change) if change > 0 else 0.0,
        flipped=flipped,
        share=share,
    )


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


def refuse_unknown(to: str, method: str, min_share: float | None) -> None:
    for name, value, allowed in (("to", to, KINDS), ("method", method, METHODS)):
        if value not in allowed:
            hint = did_you_mean(str(value), allowed)
            raise ConfigError(f"merge: {name}='{value}' is not allowed; {' or '.join(allowed)}.{hint}")
    if min_share is not None and not min_share <= 1:
        raise ConfigError(f"merge: min_share={min_share} is not allowed; a number up to 1, or None.")


def refuse_lost(report: MergeReport, to: str, min_share: float | None) -> None:
    """Unless ``min_share`` is 0 or None."""
    anyway = "min_share=0 merges all the same"
    if not min_share or (report.share is None and to == "dense"):
        return
    if report.share is None:
        raise RefusedError(f"merge: how much of the training survives in nf4 cannot be measured here; {anyway}.")
    if not report.share >= min_share:  # also where it is nan
        other = "to=dense keeps it" if to == "nf4" else "a base in bf16 or fp16 loses what one in fp32 keeps"
        raise RefusedError(
            f"merge: only a share of {report.share:.3f} of the adapter's effect would survive (min_share {min_share}); "
            f"{other}, {anyway}."
        )
