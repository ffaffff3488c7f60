"""Decoder blocks at the least memory that needs no matrix product twice.

    q, k, v = W_{q,k,v} norm(x)                         keeps x and its statistics
    x′      = x + W_o attention(rope(q), rope(k), v)    keeps q, k, v, the output and one number a row and head
    y       = x′ + W_down act(W_up norm(x′))            keeps x′, its statistics and what goes into act

Plain autograd keeps both norms' outputs, act's and its product, and attention's output twice besides. ``fuse`` sets
``forward`` on a block's instance, ``unfuse`` deletes it; parameters and their names stay. Without gradients, with a
cache, or with what ``why_not`` finds at a call, the block's own forward runs.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapted
from lowrank.adapters.sites import blocks as paths
from lowrank.adapters.sites import sites
from lowrank.fast import functions, norm, seen, site
from lowrank.fast.documents import DocumentAttention
from lowrank.fast.rotary import Rotary
from lowrank.models.attention import NAME, attention


@dataclass(frozen=True)
class Layout:
    """Where a class of transformers' blocks has its parts, and what it computes with them."""

    attention: str
    mlp: str
    norms: tuple[str, str]
    inputs: tuple[str, ...]  # sites of attention that read the norm: of q, k and v, or one that gives the three
    output: str
    feed_forward: tuple[str, ...]  # sites of the MLP, the last of them back to d
    activation: str
    activations: tuple[str, ...]  # classes of it that are what ``rest`` computes
    rest: Callable[..., Tensor]  # (x, norm, sites, keep) → x + MLP(norm(x))
    passes: tuple[str, ...] = ()  # of the configuration, on to attention
    head_norms: tuple[str, ...] = ()  # of q's and k's heads


LLAMA = Layout(
    "self_attn",
    "mlp",
    ("input_layernorm", "post_attention_layernorm"),
    ("q_proj", "k_proj", "v_proj"),
    "o_proj",
    ("gate_proj", "up_proj", "down_proj"),
    "act_fn",
    ("SiLU", "SiLUActivation"),
    functions.norm_gated(functions.SILU),
)
GELUS = ("NewGELUActivation", "GELUTanh")  # gelu's tanh approximation
BLOCKS: dict[str, Layout] = {
    "LlamaDecoderLayer": LLAMA,
    "MistralDecoderLayer": replace(LLAMA, passes=("sliding_window",)),
    "Qwen2DecoderLayer": LLAMA,
    "Qwen3DecoderLayer": replace(LLAMA, head_norms=("q_norm", "k_norm")),
    "Phi3DecoderLayer": replace(
        LLAMA,
        inputs=("qkv_proj",),
        feed_forward=("gate_up_proj", "down_proj"),
        activation="activation_fn",
        passes=("sliding_window",),
    ),
    "GemmaDecoderLayer": replace(LLAMA, activations=GELUS, rest=functions.norm_gated(functions.GELU)),
    "GPT2Block": Layout(
        "attn", "mlp", ("ln_1", "ln_2"), ("c_attn",), "c_proj", ("c_fc", "c_proj"), "act", GELUS, functions.norm_gelu
    ),
}
# A call with one of these is not the plain pass over whole texts that is computed here.
OTHERWISE = ("cache", "past_key_values", "encoder_hidden_states", "output_attentions")
NOT_PASSED = (
    "position_embeddings",
    "attention_mask",
    "use_cache",
    "encoder_attention_mask",
    *OTHERWISE,
)  # to attention


def fuse(model: nn.Module) -> str:
    """Takes the decoder's blocks that it knows; returns how many of how many, and what keeps the others plain."""
    known: dict[str, Any] = dict(sites(model))
    blocks = [known[path] for path in paths(model)]
    reasons = [why_not(block) for block in blocks]
    for block, reason in zip(blocks, reasons, strict=True):
        if reason is None:
            block.forward = MethodType(forward, block)
            seen.note(block)
    kept = Counter(reason for reason in reasons if reason is not None)
    plain = "; ".join(f"{count} plain: {reason}" for reason, count in kept.items())
    return f"{len(blocks) - kept.total()}/{len(blocks)} blocks" + (f" ({plain})" if plain else "")


def unfuse(model: nn.Module) -> None:
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is forward:
            del module.forward
            seen.forget(module)


def why_not(block: Any) -> str | None:
    """What keeps a block from being taken, or None."""
    layout = BLOCKS.get(type(block).__name__)
    if layout is None:
        return f"{type(block).__name__} is not known"
    attn, mlp = getattr(block, layout.attention), getattr(block, layout.mlp)
    if isinstance(attn, Adapted) or isinstance(mlp, Adapted):
        return "an adapter stands around its attention or its feed-forward"
    for parent, names in ((attn, (*layout.inputs, layout.output)), (mlp, layout.feed_forward)):
        for name in names:
            if reason := site.why_not(getattr(parent, name)):
                return f"{name}: {reason}"
    for name in layout.norms:
        if reason := norm.why_not(getattr(block, name)):
            return f"{name}: {reason}"
    if type(getattr(mlp, layout.activation)).__name__ not in layout.activations:
        return f"its activation is {type(getattr(mlp, layout.activation)).__name__}"
    if hasattr(block, "crossattention"):
        return "it has cross-attention"
    if getattr(attn, "is_causal", True) is False:
        return "its attention is not causal"
    for name, module in block.named_modules():
        if isinstance(module, nn.Dropout) and module.p:
            return f"{name} of the model is on"
        if module is not block and seen.hooked(module):
            return f"{name} has hooks"
    return None


def changed(block: Any) -> bool:
    """``why_not`` at a call: asked in full only where something is not as it was when it was last asked."""
    if seen.watched():
        return True
    if seen.unchanged(block):
        return False
    if why_not(block):
        return True
    seen.note(block)
    return False


def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    cls: Any = type(self)
    layout = BLOCKS[cls.__name__]
    attn, mlp = getattr(self, layout.attention), getattr(self, layout.mlp)
    kwargs |= dict(zip(positional(cls), args, strict=False))  # GPT-2's are given without their names
    otherwise = any(kwargs.get(name) not in (None, False) for name in OTHERWISE)
    if otherwise or not torch.is_grad_enabled() or attn.config._attn_implementation != NAME or changed(self):
        return cls.forward(self, hidden_states, **kwargs)
    before, after = (norm.norm(getattr(self, name)) for name in layout.norms)
    x = hidden_states.reshape(-1, hidden_states.shape[-1])  # (tokens, d)
    dtype = site.compute_dtype(x)
    read = functions.norm_linears(x, before, [site.site(getattr(attn, name), dtype) for name in layout.inputs])
    o = attended(attn, read, hidden_states.shape[:-1], layout, kwargs)  # (tokens, heads·width)
    middle = functions.linear_residual(o, x, site.site(getattr(attn, layout.output), dtype))
    keep = vars(self).get("keep", functions.Keep.PRODUCTS)  # as recompute.py has set it
    y = layout.rest(middle, after, [site.site(getattr(mlp, name), dtype) for name in layout.feed_forward], keep)
    return y.view(hidden_states.shape)


@cache
def positional(cls: Any) -> tuple[str, ...]:
    """What a block's arguments after hidden_states are called."""
    return tuple(inspect.signature(cls.forward).parameters)[2:]


def attended(attn: Any, read: tuple[Tensor, ...], shape: torch.Size, layout: Layout, kwargs: dict[str, Any]) -> Tensor:
    """Attention's output (tokens, heads·width) from q, k and v, or from one tensor that holds the three."""
    each = read if len(read) == 3 else read[0].split(widths(attn), dim=-1)
    heads = [part.view(*shape, -1, attn.head_dim) for part in each]  # (batch, seq, heads, width)
    for i, name in enumerate(layout.head_norms):
        heads[i] = functions.normed(heads[i], norm.norm(getattr(attn, name)))
    q, k, v = (part.transpose(1, 2) for part in heads)  # (batch, heads, seq, width)
    angles = kwargs.get("position_embeddings")  # (batch, seq, width) twice
    if angles is not None:
        v = v.contiguous() if len(read) == 1 else v  # a view would keep q and k as they were before they were turned
        q, k = Rotary.apply(q, *angles), Rotary.apply(k, *angles)
    passed = {name: value for name, value in kwargs.items() if name not in NOT_PASSED}
    passed |= {name: getattr(attn.config, name, None) for name in layout.passes}
    dropout = getattr(attn, "attention_dropout", 0.0) if attn.training else 0.0
    edges = passed.get("cu_seqlens")
    if edges is not None and q.device.type == "cpu" and not dropout and is_plain(attn, passed, edges):
        out = DocumentAttention.apply(q, k, v, edges.tolist(), attn.scaling)
    else:
        out, _ = attention(attn, q, k, v, kwargs.get("attention_mask"), dropout=dropout, scaling=attn.scaling, **passed)
    return out.reshape(-1, out.shape[-2] * out.shape[-1])


def widths(attn: Any) -> list[int]:
    """Of q, k and v where one site gives the three."""
    heads = attn.config.num_attention_heads
    kv = getattr(attn.config, "num_key_value_heads", None) or heads
    return [heads * attn.head_dim, kv * attn.head_dim, kv * attn.head_dim]


def is_plain(attn: Any, passed: dict[str, Any], edges: Tensor) -> bool:
    """Whether nothing but causality and documents decides what a token sees."""
    window = passed.get("sliding_window") or getattr(attn, "sliding_window", None)
    return passed.get("prefix_kv") is None and (not window or int(edges.diff().max()) <= window)
