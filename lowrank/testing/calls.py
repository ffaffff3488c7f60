"""The ways a model is called: training at a set time, evaluation, checkpointing, packs, generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from lowrank.adapters.inject import apply, named_trainable
from lowrank.fast.recompute import MODES, recompute
from lowrank.keys import Clock
from lowrank.models import attention
from lowrank.testing.bases import tokens
from lowrank.testing.trial import HOLDS, SEED, Outcome, Trial, differing, fails, far, logits, values

NEW = 4  # tokens to generate


def dropout(trial: Trial) -> Outcome:
    """At a set time a training pass repeats bit for bit; evaluation knows neither time nor chance."""
    clock = Clock(5)
    model = trial.trained(clock=clock, **trial.dropout)
    parameters = named_trainable(model)
    passes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        passes.append(training_pass(model.train(), clock, parameters))
        if not torch.equal(torch.get_rng_state(), before):
            return fails("a training pass draws from torch's default generator, though the clock is set")
    name = differing(*passes)
    if name:
        return fails(f"two training passes at the same time of the clock differ ({name})")
    return evaluation(trial, model.eval(), clock)


def training_pass(model: Any, clock: Clock, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The logits and each parameter's gradient, at one set time."""
    clock.set(4, 2)
    found = model(input_ids=tokens(), use_cache=False).logits
    gradients = torch.autograd.grad(found.square().mean(), list(parameters.values()), allow_unused=True)
    named = {f"the gradient of {name}": g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return {"the logits": found.detach(), **named}


def evaluation(trial: Trial, model: Any, clock: Clock) -> Outcome:
    before = torch.get_rng_state()
    first = logits(model)
    clock.set(9, 1)
    apart = far(logits(model), first, 0.0)
    if apart:
        return fails(f"two evaluations differ ({apart})")
    if not torch.equal(torch.get_rng_state(), before):
        return fails("an evaluation draws from torch's default generator")
    if trial.dropout:
        other = trial.base.fresh()
        apply(other, trial.plan(other, dropout=0.0), SEED, state=values(model))
        apart = far(first, logits(other), 0.0)
        if apart:
            return fails(f"dropout changes an evaluation ({apart})")
    return HOLDS


def checkpointing(trial: Trial) -> Outcome:
    """Gradients are the same when activations are computed again in the backward pass, all or some of them."""
    found = {}
    for mode in MODES:
        clock = Clock(5)
        model: Any = trial.trained(trial.base.fresh(), clock=clock, **trial.dropout).train()
        recompute(model, mode)
        torch.manual_seed(0)
        found[mode] = training_pass(model, clock, named_trainable(model))
    for mode, recomputed in found.items():
        for name, wanted in found["off"].items():
            apart = far(recomputed[name], wanted, 1e-5)
            if apart:
                return fails(f"{name} is another under gradient checkpointing ({mode}: {apart})")
    return HOLDS


def packing(trial: Trial) -> Outcome:
    """In a pack each document computes what it computes alone, and does not see the one before it."""
    first, other, second = tokens(3, 7)
    model = trial.trained()
    with torch.no_grad():
        together, changed = attention.logits_of(model, [first, second]), attention.logits_of(model, [other, second])
        alone = torch.cat([attention.logits_alone(model, document) for document in (first, second)])
    apart = far(changed[7:], together[7:], 0.0)
    if apart:
        return fails(f"other tokens in document 1 change the logits of document 2 ({apart})")
    apart = far(together, alone, 1e-4)
    return fails(f"two documents in a pack differ from each alone ({apart})") if apart else HOLDS


def generation(trial: Trial) -> Outcome:
    """With the cache, without it, and in one plain pass: the same logits and tokens; also after padding."""
    model = trial.trained()
    model.generation_config = GenerationConfig()
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    cached, plain = generated(model, ids, mask, cache=True), generated(model, ids, mask, cache=False)
    whole = logits(model, plain.sequences[:, :-1])[:, 5:]  # (2, NEW, vocabulary)
    apart = far(torch.stack(plain.logits, 1), whole, 1e-4)
    if apart:
        return fails(f"generation without a cache differs from one pass over the same tokens ({apart})")
    apart = far(torch.stack(cached.logits, 1), whole, 1e-4)
    if apart or not torch.equal(cached.sequences, plain.sequences):
        return fails(f"generation with the cache differs from generation without it ({apart})")
    mask[0, :3] = 0
    cached, plain = generated(model, ids, mask, cache=True), generated(model, ids, mask, cache=False)
    apart = far(torch.stack(cached.logits, 1), torch.stack(plain.logits, 1), 1e-4)
    if apart:
        return fails(f"after a padded prompt, generation with the cache differs from that without it ({apart})")
    short = generated(model, ids[:1, 3:], mask[:1, 3:], cache=True)
    apart = far(torch.stack(cached.logits, 1)[:1], torch.stack(short.logits, 1), 1e-4)
    return fails(f"padding before a prompt changes what is generated ({apart})") if apart else HOLDS


def generated(model: Any, ids: Tensor, mask: Tensor, *, cache: bool) -> Any:
    """The tokens (rows, length + NEW) and the logits, NEW of (rows, vocabulary), of a greedy search."""
    settings = GenerationConfig(
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=cache,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return model.generate(ids, attention_mask=mask, generation_config=settings)
