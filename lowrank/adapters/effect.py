"""What an adapter does to a model's logits, and how much of that another model has kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.base import Adapted, dense_weight
from lowrank.adapters.sites import TRAINED, adapted
from lowrank.errors import ConfigError
from lowrank.keys import key

Tokens = Tensor | Sequence[Sequence[int]]  # (rows, width) ids, or rows of them

CHUNK = 2048  # tokens whose logits are held at a time
NOTHING = 1e-5  # an effect, as a share of the logits, that fp32's rounding alone could have (PiSSA at its start)


@dataclass(frozen=True)
class Kept:
    """Over all the probe's logits. ``share`` is None where nothing can be said of it."""

    share: float | None  # 1 − ‖merged − wrapped‖ / ‖wrapped − base‖
    difference: float  # max |merged − wrapped|
    scale: float  # max |wrapped|
    effect: float  # ‖wrapped − base‖ / ‖wrapped‖


@torch.no_grad()
def kept(model: nn.Module, result: nn.Module, probe: Tensor) -> Kept:
    """What ``result`` keeps of the difference that the adapters of ``model`` make; ``probe`` (rows, width).

    Where they make none (or one of fp32's rounding) there is nothing to lose: the share is 1. It is None where the
    base's own parameters have trained, so that their effect is not known, and the result differs.
    """
    lost = effect = whole = difference = scale = 0.0
    trained: tuple[object, ...] = getattr(model, TRAINED, ())
    device = next(model.parameters()).device
    with evaluating(model), evaluating(result):
        for rows in probe.to(device).split(max(1, CHUNK // probe.shape[1])):
            wrapped, merged = logits(model, rows), logits(result, rows)
            with without_adapters(model):
                base = logits(model, rows)
            lost += squares(merged - wrapped)
            effect += squares(wrapped - base)
            whole += squares(wrapped)
            difference = max(difference, float((merged - wrapped).abs().max()))
            scale = max(scale, float(wrapped.abs().max()))
    share: float | None = 1.0 if not lost or not trained else None  # where there is no effect
    if effect > NOTHING**2 * whole:
        share = 1 - math.sqrt(lost / effect)
    return Kept(share, difference, scale, math.sqrt(effect / whole) if whole else 0.0)


def logits(model: nn.Module, rows: Tensor) -> Tensor:
    """(rows, width, vocabulary), fp32 at least."""
    found: Tensor = model(input_ids=rows).logits
    return found.to(torch.promote_types(found.dtype, torch.float32))


def squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def table(tokens: Tokens) -> Tensor:
    """(rows, width) ids; rows of unequal length are put end to end and cut anew to their mean length."""
    if isinstance(tokens, Tensor):
        found = tokens[None] if tokens.ndim == 1 else tokens
    else:
        try:
            rows = [list(row) for row in tokens]
            ids = [token for row in rows for token in row]
            width = max(1, len(ids) // max(1, len(rows)))
            found = torch.tensor(ids[: len(ids) // width * width], dtype=torch.int64).view(-1, width)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"merge: a probe is rows of token ids ({error}).") from error
    if found.ndim != 2 or not found.numel() or found.is_floating_point():
        shape = "×".join(str(size) for size in found.shape)
        raise ConfigError(f"merge: a probe of {shape} {found.dtype} is not allowed; (rows, width) token ids.")
    return found


def refuse_unknown_ids(model: nn.Module, ids: Tensor | None) -> None:
    """Raises ConfigError for a token that the model does not have."""
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if get else None
    embedding = embedding.base if isinstance(embedding, Adapted) else embedding
    if ids is None or not isinstance(embedding, nn.Embedding):
        return
    for token in (int(ids.min()), int(ids.max())):
        if not 0 <= token < embedding.num_embeddings:
            raise ConfigError(
                f"merge: token {token} of the probe is not allowed; the model has {embedding.num_embeddings:,}."
            )


def random_tokens(config: Any) -> Tensor:
    """(4, 64) keyed random ids, or as wide as the model can read."""
    text = config.get_text_config()
    width = min(64, getattr(text, "max_position_embeddings", None) or 64)
    return torch.randint(0, text.vocab_size, (4, width), generator=key(0, "merge probe"))


def before(site: Adapted) -> Callable[..., Any]:
    """The call that stood here before the adapter: the original module's; or, where the start took s·B₀A₀ out of it
    and it was not kept, the base's with that put back."""
    if site.original is not None:
        return site.original
    taken = taken_out(site)
    return site.base if taken is None else partial(with_factors, site.base, *taken)


def weight_before(site: Adapted) -> Tensor:
    """The weight (out, in) that stood here before the adapter."""
    weight = dense_weight(site.base if site.original is None else site.original)
    taken = taken_out(site) if site.original is None else None
    return weight if taken is None else weight + (taken[1] @ taken[0]).to(weight.dtype)


def taken_out(site: Adapted) -> tuple[Tensor, Tensor] | None:
    """A₀ (r, in) and s·B₀ (out, r), where the adapter holds what its start took out of the base."""
    held: Any = site.adapter
    A, B = getattr(held, "A0", None), getattr(held, "B0", None)
    return None if A is None or B is None else (A, held.scale * B)


def with_factors(base: nn.Module, A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    y: Tensor = base(x)  # (…, out)
    A, B = A.to(y.dtype), B.to(y.dtype)
    return y + F.linear(F.embedding(x, A.T) if isinstance(base, nn.Embedding) else F.linear(x, A), B)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model that the adapters were put on, inside; nothing but the calls of its sites is changed."""
    wrapped = [site for _, site in adapted(model)]
    for site in wrapped:
        vars(site)["forward"] = before(site)  # no submodule: it would be one of the site's
    try:
        yield
    finally:
        for site in wrapped:
            del vars(site)["forward"]


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
