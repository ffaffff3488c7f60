"""Tiny random models built from their configs: small enough for finite differences, wide enough for NF4's blocks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lowrank.adapters.base import Adapter
from lowrank.errors import ConfigError, did_you_mean
from lowrank.keys import key
from lowrank.models import attention
from lowrank.quant.convert import quantize

VOCABULARY, WIDTH, LAYERS, HEADS = 64, 32, 2, 4
SPREAD = 0.2  # transformers' 0.02 makes attention nearly uniform, so that a leak or a wrong scale would not show

MODELS = ("llama", "gpt2", "nf4")
# Where a class goes that is tried on all it says it takes: each kind of site, and the pattern that names it.
PATTERNS = {"linear": "all-linear", "block": "blocks", "backbone": "backbone", "parameter": "*"}


def build_llama(**changes: object) -> LlamaForCausalLM:
    """2 layers of 32, 4 query heads over 2 key/value heads, MLP of 48, untied head: fp32, evaluation mode."""
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": SPREAD,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def build_gpt2(**changes: object) -> GPT2LMHeadModel:
    """2 layers of 32, 4 heads, Conv1D, tied head, dropout 0.1 as GPT-2 has: fp32, evaluation mode."""
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": 128,
        "initializer_range": SPREAD,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes})).eval()


@dataclass(frozen=True)
class Base:
    """A column of the table: one of the models, and where on it the method goes."""

    name: str
    model: str
    targets: Any  # a pattern, a list of patterns, or patterns with their own options

    def fresh(self) -> Any:
        """The model, the same each time: packed attention installed, as a run has it, and no dropout of its own."""
        return copy.deepcopy(built(self.model))

    def exact(self) -> Any:
        """The same in fp64 throughout: Llama's own norm computes in fp32 whatever its input is."""
        model = self.fresh()
        for path, module in list(model.named_modules()):
            if isinstance(module, LlamaRMSNorm):
                norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
                norm.weight = module.weight
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, norm)
        return model.double()


@cache
def built(model: str) -> nn.Module:
    made = quantize(copy.deepcopy(dense(model))) if model == "nf4" else dense(model)
    refused = attention.install(made)
    assert refused is None, refused
    return made


@cache
def dense(model: str) -> nn.Module:
    """The weights before any quantising. Biases and norms are moved from their 0 and 1, at which a lost one would not
    show; Llama's attention has biases where it will be NF4, so that such a layer is met with one and without."""
    dropless = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    made: Any = build_gpt2(**dropless) if model == "gpt2" else build_llama(attention_bias=model == "nf4")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=key(0, "vector", name)))
    return made


def columns(cls: type[Adapter], targets: Any = None) -> tuple[Base, ...]:
    """Every model with ``targets``; without them, with each kind of site that the class says it takes, embeddings on
    GPT-2, whose head is tied to them. Raises ConfigError where the class says nothing, or a kind that there is not."""
    known = (*PATTERNS, "embedding")
    unknown = [kind for kind in cls.sites if kind not in known]
    if unknown or not cls.sites:
        wrong = f"'{unknown[0]}'" if unknown else "no site"
        hint = did_you_mean(unknown[0], known) if unknown else ""
        raise ConfigError(f"check: {cls.__name__}.sites: {wrong} is not allowed; any of {', '.join(known)}.{hint}")
    if targets:
        return tuple(Base(model, model, targets) for model in MODELS)
    places = [PATTERNS[kind] for kind in cls.sites if kind in PATTERNS]
    names = {
        (model, place): model if place == places[0] else f"{model} {place}" for place in places for model in MODELS
    }
    made = [Base(name, model, place) for (model, place), name in names.items()]
    return (*made, *([Base("embedding", "gpt2", "embedding")] if "embedding" in cls.sites else []))


def tokens(rows: int = 2, length: int = 11) -> Tensor:
    """(rows, length) token ids."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=key(1, "tokens", rows, length))
