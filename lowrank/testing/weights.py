"""What happens to weights: the base's own stay as they are, merging keeps the function, moving keeps the numbers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.base import Adapted, NotMergeable, dense_weight
from lowrank.adapters.inject import apply, named_trainable, remove
from lowrank.adapters.merge import merge
from lowrank.adapters.sites import adapted, site_kind
from lowrank.keys import Clock, key
from lowrank.quant.nf4 import NF4Linear
from lowrank.testing.bases import tokens
from lowrank.testing.trial import HOLDS, Outcome, Trial, differing, fails, far, logits, moved, not_promised, values


def untouched(trial: Trial) -> Outcome:
    """Building, training two steps and evaluating leave every bit of what does not train as it was."""
    model, clock = trial.base.fresh(), Clock(2)
    before = held(model)
    trial.wrapped(model, clock=clock)
    training = {id(p) for p in named_trainable(model).values()}
    started = [held(module.base) for _, module in adapted(model)]  # where the start has changed the base: the new one
    optimizer = torch.optim.SGD(list(named_trainable(model).values()), lr=0.1)
    for step in (1, 2):
        clock.set(step, 0)
        model.train()(input_ids=tokens(), use_cache=False).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    logits(model.eval())
    for name, tensor, value in (row for rows in (before, *started) for row in rows):
        if id(tensor) not in training and not torch.equal(tensor, value):
            return fails(f"{name} of the base has changed")
    return HOLDS


def held(module: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """Every tensor of a module by name, with a copy of its value."""
    return [(name, t, t.detach().clone()) for name, t in (*module.named_parameters(), *module.named_buffers())]


def merging(trial: Trial) -> Outcome:
    """The merged weight computes what the wrapped call does, or the class says that there is none."""
    model = trial.trained(trial.base.exact()).double()
    try:
        merged, _ = merge(model, min_share=None)  # a wrong one is to be named by its site
    except NotMergeable as error:
        return not_promised(str(error).partition(": ")[2] or str(error))
    for path, module in adapted(model):
        wrong = wrongly_merged(module)
        if wrong:
            return fails(f"{path}: {wrong}")
    quantised = any(isinstance(module.base, NF4Linear) for _, module in adapted(model))  # LoftQ's are on any base
    bound = 1e-6 if quantised else 1e-9  # NF4 weights are dequantised, and so merged, in fp32
    apart = far(logits(merged), logits(model), bound)
    return fails(f"the merged model differs from the wrapped one ({apart})") if apart else HOLDS


@torch.no_grad()
def wrongly_merged(site: Adapted) -> str | None:
    """What is wrong with a site's merged weight, or None; in fp64."""
    base, adapter = site.base, site.adapter
    weight, bias = dense_weight(base).double(), getattr(base, "bias", None)
    given = weight.clone()
    new, new_bias = adapter.merged(given, bias)
    if not torch.equal(given, weight):
        return "merged changes the weight that it is given"
    factors = adapter.factors()
    if factors is not None and (apart := far(weight + factors[1] @ factors[0], new, 1e-9)):
        return f"W + B A of its factors differs from its merged weight ({apart})"
    if site_kind(base) == "embedding":
        ids = torch.arange(weight.shape[1])
        apart = far(F.embedding(ids, new.T), site(ids), 1e-9)
    else:
        x = torch.randn(5, weight.shape[1], generator=key(0, "x"), dtype=torch.float64)
        apart = far(F.linear(x, new, new_bias), site(x), 1e-9)
    return f"the merged weight differs from the wrapped call ({apart})" if apart else None


def moves(trial: Trial) -> Outcome:
    """The adapter follows its model to fp64 and bf16 and to other devices, and works in fp32 over a bf16 base."""
    model = trial.trained()
    names, before = values(model).keys(), logits(model)
    for dtype, bound in ((torch.float64, 1e-4), (torch.bfloat16, 0.2)):
        model = trial.trained().to(dtype)
        if values(model).keys() != names:
            return fails(f"moved to {short(dtype)}: what its sites share is no longer one tensor")
        wrong = wrong_in(model, dtype, before, bound)
        if wrong:
            return fails(f"moved to {short(dtype)}: {wrong}")
    # The same values: what is read off a weight (PiSSA) may start elsewhere over a rounded one.
    over = apply(trial.base.fresh().bfloat16(), trial.planned, state=values(trial.trained()))
    wrong = wrong_in(over, torch.bfloat16, before, 0.2)
    if not wrong:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wrong = wrong_in(over, torch.bfloat16, before, 0.2)
    if wrong:
        return fails(f"in fp32 over a bf16 base: {wrong}")
    wrong = left_behind(trial.trained())
    if wrong is None and torch.cuda.is_available():
        wrong = wrong_in(trial.trained().to("cuda"), torch.float32, before, 1e-3, device="cuda")
    return fails(wrong) if wrong else HOLDS


def wrong_in(model: nn.Module, dtype: torch.dtype, before: Tensor, bound: float, device: str = "cpu") -> str | None:
    """What is wrong with logits and gradients after a move, or None."""
    parameters = named_trainable(model)
    found = model(input_ids=tokens().to(device)).logits
    if found.dtype != dtype:
        return f"the logits are {short(found.dtype)}"
    apart = far(found.detach().float(), before.to(device), bound)
    if apart:
        return f"the logits differ from those in fp32 ({apart})"
    gradients = torch.autograd.grad(found.float().square().mean(), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and not gradient.isfinite().all():
            return f"the gradient of {name} is not finite"
    return None


def left_behind(model: Any) -> str | None:
    """A tensor that does not follow its model to another device because it is neither parameter nor buffer."""
    model.to("meta")
    for path, module in adapted(model):
        for part in module.adapter.modules():
            for name, value in vars(part).items():
                if isinstance(value, Tensor) and not value.is_meta:
                    return f"{path}: {name} stays on its device: register it as a buffer"
    return None


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def removal(trial: Trial) -> Outcome:
    """``remove`` puts back the very modules that were there, frozen; a base that was not trained computes as before."""
    model = trial.base.fresh()
    modules, before = dict(model.named_modules()), logits(model)
    logits(trial.trained(model))
    trained = {name: p.clone() for name, p in model.named_parameters() if ".adapter." not in name}
    after = dict(remove(model).named_modules())
    other = [name for name in modules.keys() | after.keys() if modules.get(name) is not after.get(name)]
    if other:
        return fails(f"{sorted(other)[0]} is not the module that was there")
    if any(p.requires_grad for p in model.parameters()):
        return fails("something still requires grad")
    if "parameter" in trial.cls.sites:  # what was trained stays
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, trained[name])]
        return fails(f"{changed[0]} has lost what it was trained to") if changed else HOLDS
    apart = far(logits(model), before, 0.0)
    return fails(f"the base computes something else afterwards ({apart})") if apart else HOLDS


def copies(trial: Trial) -> Outcome:
    """A deep copy computes the same and, trained, what its own values say; the one it was copied from stays."""
    model = trial.trained()
    before = logits(model)
    other = copy.deepcopy(model)
    name = differing(values(other), values(model))
    if name:
        return fails(f"a deep copy has another {name}")
    apart = far(logits(other), before, 0.0)
    if apart:
        return fails(f"a deep copy computes something else ({apart})")
    moved(moved(other))
    apart = far(logits(model), before, 0.0)
    if apart:
        return fails(f"training a deep copy changes the one it was copied from ({apart})")
    alike = moved(moved(trial.trained()))
    apart = far(logits(other), logits(alike), 0.0)
    return fails(f"a deep copy does not compute with its own parameters ({apart})") if apart else HOLDS
