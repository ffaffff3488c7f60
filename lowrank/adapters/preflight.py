"""What is checked before the first step, on the model that will train."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.base import LINEAR, Adapted, NotMergeable, dense_weight
from lowrank.adapters.inject import named_trainable
from lowrank.adapters.plan import InjectionPlan
from lowrank.adapters.sites import adapted
from lowrank.errors import ConfigError
from lowrank.keys import key


def check_identity(model: nn.Module, base_logits: Tensor, logits: Tensor) -> None:
    """Wrapped equals base at the start, bit for bit, where every method on the model promises it."""
    promised = {module.adapter.identity_at_start for _, module in adapted(model)}
    if promised - {True} or not base_logits.isfinite().all():
        return
    if not torch.equal(base_logits, logits):
        difference = float((base_logits - logits).abs().max())
        raise ConfigError(
            f"pre-flight: the wrapped model differs from its base before training (max |Δlogit| {difference:.2e}), "
            f"though its adapters promise to start as the identity. The adapter class is wrong."
        )


def check_trainable(model: nn.Module, plan: InjectionPlan, grouped: list[nn.Parameter]) -> None:
    """Exactly the planned parameters require grad, and each is in exactly one optimizer group."""
    trainable = named_trainable(model)
    required = {id(p) for p in model.parameters() if p.requires_grad}
    stray = required - {id(p) for p in trainable.values()}
    total = sum(p.numel() for p in trainable.values())
    places = {name.partition(".adapter.")[0] for name in trainable}
    if stray or total != plan.trainable_parameters or places != {row.path for row in plan.rows if row.parameters}:
        raise ConfigError(
            f"pre-flight: {total:,} parameters require grad and {len(stray)} tensors outside the plan do, "
            f"but the plan has {plan.trainable_parameters:,}."
        )
    unique = {id(p) for p in grouped}
    if len(unique) != len(grouped) or unique != required:
        raise ConfigError("pre-flight: a trainable parameter is in no optimizer group, or in two.")


def check_gradients(model: nn.Module) -> None:
    """After a backward: each adapter has at least one parameter with a non-zero gradient.

    One alone is enough: LoRA's A has none while B is zero. Gradients that are not finite are left to the loop's
    finite guard.
    """
    for path, module in adapted(model):
        gradients = [p.grad for p in module.adapter.parameters() if p.requires_grad]
        if not any(g is not None and (g.any() or not g.isfinite().all()) for g in gradients):
            raise ConfigError(
                f"pre-flight: {path}: no parameter of {type(module.adapter).__name__} gets a gradient, so it would "
                f"never train. Is the site used by the model's forward?"
            )


def check_subclasses(model: nn.Module) -> None:
    """A subclass of Linear or Embedding with its own ``forward`` is taken only if merging would be right."""
    for path, module in adapted(model):
        base = module.base
        known = (*LINEAR, nn.Embedding)
        if type(base) in known or not isinstance(base, known):
            continue
        if not merged_equals_wrapped(module):
            raise ConfigError(
                f"pre-flight: {path} is a {type(base).__name__} whose forward is not x Wᵀ + b, so an adapter that "
                f"changes its weight would not do what its equation says. Leave this site out of adapter.targets."
            )


@torch.no_grad()
def merged_equals_wrapped(module: Adapted) -> bool:
    base = module.base
    weight = dense_weight(base)
    try:
        merged, bias = module.adapter.merged(weight, getattr(base, "bias", None))
    except NotMergeable:
        return True
    if isinstance(base, nn.Embedding):
        probe = torch.arange(min(8, base.num_embeddings), device=weight.device)
        expected = F.embedding(probe, merged.T)
    else:
        probe = torch.randn(4, weight.shape[1], generator=key(0, "probe")).to(weight)
        expected = F.linear(probe, merged, bias)
    was_training = module.training
    actual = module.eval()(probe)
    module.train(was_training)
    return bool(torch.allclose(actual, expected.to(actual.dtype), rtol=1e-3, atol=1e-3 * float(expected.abs().max())))
