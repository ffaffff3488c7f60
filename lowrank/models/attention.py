"""Attention that never crosses a document, registered with transformers.

Packed documents stand end to end in one row and their boundaries travel as the forward keyword ``cu_seqlens``
(documents + 1,), cumulative lengths from 0, best in the host's memory whatever the model's device: every layer reads
them. transformers hands unknown keywords down to the attention function, so
every architecture that looks its attention up in ``AttentionInterface`` is served by the one function below.
Without ``cu_seqlens`` (padded batches, generation) it is transformers' own SDPA. The keyword ``prefix_kv`` holds, by
layer, keys and values that come before those of every document and of every row, in each token's sight whatever the
mask or a sliding window hides; a cache never holds them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from lowrank.errors import ConfigError
from lowrank.models import varlen

NAME = "lowrank"


class PrefixLayers(Protocol):
    def __getitem__(self, layer: int, /) -> Tensor:
        """(2, kv heads, k, head width): keys, then values."""


def attention(
    module: nn.Module,
    query: Tensor,  # (batch, heads, tokens, head width)
    key: Tensor,  # (batch, kv heads, keys, head width)
    value: Tensor,  # (batch, kv heads, keys, head width)
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    prefix_kv: PrefixLayers | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; returns (batch, tokens, heads, head width) and no weights."""
    prefix = None if prefix_kv is None else prefix_of(module, prefix_kv, key)
    if cu_seqlens is None:
        if prefix is not None:
            refuse_what_is_not_plain(kwargs)
            key, value, attention_mask = behind(prefix, query.shape[2], key, value, attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    refuse_what_is_not_plain(kwargs)
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    if prefix is None and not kwargs.get("dropout") and varlen.why_not(query, key, value) is None:
        return varlen.attention(query, key, value, cu_seqlens, window=window, scale=kwargs.get("scaling")), None
    edges = cu_seqlens.tolist()
    documents = [
        document_attention(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], window, kwargs, prefix)
        for a, b in pairwise(edges)
    ]
    return torch.cat(documents, dim=1), None  # (1, tokens, heads, head width)


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, kwargs: dict[str, Any], prefix: Tensor | None = None
) -> Tensor:
    """Causal attention within one document; with a sliding window, over the last ``window`` tokens."""
    length = q.shape[2]
    mask = None
    if window is not None and length > window:
        distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        mask = (distance >= 0) & (distance < window)  # (query, key)
    if prefix is not None:
        k, v, mask = behind(prefix, length, k, v, mask)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and prefix is None,
        dropout_p=kwargs.get("dropout") or 0.0,
        scale=kwargs.get("scaling"),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)  # (1, length, heads, head width)


def prefix_of(module: Any, prefix_kv: PrefixLayers, key: Tensor) -> Tensor:
    """(2, kv heads, k, head width): a layer's own part of the prefix, in its keys' dtype."""
    prefix = prefix_kv[module.layer_idx]
    if prefix.shape[1] != key.shape[1] or prefix.shape[3] != key.shape[3]:
        raise ConfigError(
            f"adapter: layer {module.layer_idx} keeps {key.shape[1]} heads of {key.shape[3]}, the prefix is of "
            f"{prefix.shape[1]} of {prefix.shape[3]}: Prefix needs keys and values of one shape in every layer."
        )
    return prefix.to(key.dtype)


def behind(
    prefix: Tensor, tokens: int, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask (…, tokens, keys) with the prefix before them; without a mask they are causal."""
    if mask is None and tokens > 1:
        key, value = key[:, :, :tokens], value[:, :, :tokens]  # a static cache's further entries are empty yet
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=key.device).tril()
        mask = mask[None, None]  # (1, 1, tokens, keys)
    if mask is not None:
        mask = F.pad(mask, (prefix.shape[2], 0), value=1 if mask.dtype == torch.bool else 0)  # in sight
    first, second = prefix[:, None].expand(-1, key.shape[0], -1, -1, -1)  # (batch, kv heads, k, head width)
    return torch.cat([first, key], dim=2), torch.cat([second, value], dim=2), mask


class NotPackable(ValueError):
    """The model's attention does more than softmax(q kᵀ) v; its documents are padded instead."""


def refuse_what_is_not_plain(kwargs: dict[str, Any]) -> None:
    for extra in ("softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(extra) is not None:
            raise NotPackable(f"its attention uses {extra}")
    if kwargs.get("is_causal") is False:
        raise NotPackable("its attention is not causal")


def no_mask(device: torch.device) -> Tensor:
    """What stands for the mask beside ``cu_seqlens``: transformers passes a 4D mask on as it is, and so does not
    build the (tokens, tokens) one that it would make out of restarting positions."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def install(model: Any) -> str | None:
    """Makes the model use this attention; returns why it cannot, or None."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    if not getattr(model, "_supports_sdpa", False):
        return "the architecture does not take another attention function"
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, KeyError) as error:
        return str(error).splitlines()[0]
    return None


@torch.no_grad()
def cannot_pack(model: Any) -> str | None:
    """Why packed documents would not be what they are alone, or None where they are exact: tried on this model,
    which must be in evaluation mode.

    (a) Other tokens in document 1 leave document 2's logits bit-identical (within rounding for experts, whose
    matrices see other rows beside them); (b) packed against separate within 1e-4·max|logit| in fp32 (2e-2 in half
    precision).
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(0, vocabulary, (3, 7), generator=generator)
    try:
        together, changed = logits_of(model, [first, second]), logits_of(model, [other, second])
        alone = logits_alone(model, second)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    scale = float(alone.abs().max())
    tolerance = 1e-4 if alone.dtype in (torch.float32, torch.float64) else 2e-2
    moved = float((together[7:] - changed[7:]).abs().max())
    if moved > (tolerance * scale if has_experts(model) else 0.0):
        return f"a document sees the one before it (max |Δlogit| {moved:.1e})"
    apart = float((together[7:] - alone).abs().max())
    if not apart <= tolerance * scale:
        return f"packed logits differ from separate ones (max |Δlogit| {apart:.1e} of {scale:.1f})"
    return None


def has_experts(model: Any) -> bool:
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def logits_of(model: Any, documents: list[Tensor]) -> Tensor:
    """(tokens, vocabulary) logits of documents packed end to end."""
    device = next(model.parameters()).device
    lengths = [len(document) for document in documents]
    return model(
        input_ids=torch.cat(documents)[None].to(device),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        attention_mask=no_mask(device),
        use_cache=False,
    ).logits[0]


def logits_alone(model: Any, document: Tensor) -> Tensor:
    """(tokens, vocabulary) logits of one document on the model's ordinary path."""
    device = next(model.parameters()).device
    return model(input_ids=document[None].to(device), use_cache=False).logits[0]
