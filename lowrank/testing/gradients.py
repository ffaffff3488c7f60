"""Gradients against finite differences, in fp64: of each kind of site alone, and of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck

from lowrank.adapters.base import Adapted, shape
from lowrank.adapters.inject import named_trainable
from lowrank.adapters.sites import adapted, site_kind
from lowrank.keys import Clock, key
from lowrank.testing.bases import VOCABULARY, tokens
from lowrank.testing.trial import Outcome, Trial, fails, not_applicable, not_promised

STEP = 1e-6


def of_sites(trial: Trial) -> Outcome:
    """A layer's output by its input and by each parameter of its adapter; with dropout, at a set time."""
    checked = 0
    for training, model in modes(trial):
        wrapped = [(path, m) for path, m in adapted(model.train(training)) if site_kind(m.base) != "other"]
        kinds = {(type(m.base), type(m.adapter), shape(m.base)): (path, m) for path, m in wrapped}
        for path, site in kinds.values():
            wrong = next(wrongly_derived(site), None)
            if wrong:
                mode = "training" if training else "evaluation"
                return fails(f"{path}, in {mode} mode: the gradient of {wrong} is not the finite difference")
            checked += 1
    if not checked:
        return not_applicable("not a layer with an input of its own: the model's gradients cover it")
    return Outcome("holds", left_out(trial))


def left_out(trial: Trial) -> str:
    """What the class says of its gradient; empty where it promises all of it."""
    names = trial.cls.gradient_leaves_out
    return f"but for {', '.join(names)}, whose gradient leaves a term out, as the class says" if names else ""


def modes(trial: Trial) -> Iterator[tuple[bool, nn.Module]]:
    """The model in evaluation mode and, with dropout where the method has it, at a set time of training."""
    clock = Clock(1)
    clock.set(1, 0)
    model = trial.trained(trial.base.exact(), clock=clock, **trial.dropout).double()
    yield False, model.eval()
    yield True, model.train()


def wrongly_derived(site: Adapted) -> Iterator[str]:
    """What a site's output is wrongly derived by: its input or names of parameters."""
    if site_kind(site.base) == "embedding":
        x = torch.tensor([[1, 2], [2, 0]])
        inputs: dict[str, Tensor] = {}
    else:
        x = torch.randn(3, shape(site.base)[1], generator=key(0, "x"), dtype=torch.float64, requires_grad=True)
        inputs = {"its input": x}
    exact = {n: p for n, p in site.adapter.named_parameters() if n not in site.adapter.gradient_leaves_out}
    inputs |= {name: p for name, p in exact.items() if p.requires_grad}

    def output(_: Tensor) -> Tensor:
        found: Tensor = site(x)
        return found

    for name, tensor in inputs.items():
        try:
            gradcheck(output, (tensor,), fast_mode=True, check_batched_grad=False)
        except GradcheckError:
            yield name


def of_the_model(trial: Trial) -> Outcome:
    """The whole model, and the penalty beside it, along random directions of everything that trains."""
    for training, model in modes(trial):
        weights = torch.randn((2, 11, VOCABULARY), generator=key(0, "weights"), dtype=torch.float64)

        def value(model: nn.Module = model, weights: Tensor = weights) -> Tensor:
            penalty = sum(module.adapter.penalty() for _, module in adapted(model))
            return (model(input_ids=tokens(), use_cache=False).logits * weights).sum() + penalty

        inexact = {f"{path}.adapter.{n}" for path, m in adapted(model) for n in m.adapter.gradient_leaves_out}
        parameters = {name: p for name, p in named_trainable(model).items() if name not in inexact}
        if not parameters:
            return not_promised(left_out(trial))
        gradients = torch.autograd.grad(value(), list(parameters.values()))
        for draw in range(3):
            along = [torch.randn(p.shape, generator=key(draw, n), dtype=p.dtype) for n, p in parameters.items()]
            terms = torch.cat([(g * d).flatten() for g, d in zip(gradients, along, strict=True)])
            slope, found = float(terms.sum()), difference(value, list(parameters.values()), along)
            if not abs(slope - found) <= 1e-6 * (abs(slope) + float(terms.norm())) + 1e-7:
                mode = "training" if training else "evaluation"
                return fails(f"in {mode} mode: along a random direction {slope:.6g}, by finite difference {found:.6g}")
    return Outcome("holds", left_out(trial))


@torch.no_grad()
def difference(value: Callable[[], Tensor], parameters: list[nn.Parameter], along: list[Tensor]) -> float:
    """(f(p + h d) − f(p − h d)) / 2h; the parameters are put back."""
    start = [p.clone() for p in parameters]
    ends = []
    for sign in (1, -1):
        for parameter, at, direction in zip(parameters, start, along, strict=True):
            parameter.copy_(at + sign * STEP * direction)
        ends.append(float(value()))
    for parameter, at in zip(parameters, start, strict=True):
        parameter.copy_(at)
    return (ends[0] - ends[1]) / (2 * STEP)
