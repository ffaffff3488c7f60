"""Attention within documents: exact where the architecture takes it, refused where it would not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)

from lowrank.errors import ConfigError
from lowrank.models import attention
from lowrank.models.attention import NotPackable, cannot_pack, install

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
PACKABLE: dict[str, PretrainedConfig] = {
    "mistral": MistralConfig(**LLAMA_LIKE, sliding_window=4),
    "qwen3": Qwen3Config(**LLAMA_LIKE, sliding_window=5, use_sliding_window=True, max_window_layers=1),
    "mixtral": MixtralConfig(**LLAMA_LIKE, num_local_experts=4),
    "neox": GPTNeoXConfig(**LLAMA_LIKE),
    "opt": OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.2,
        word_embed_proj_dim=32,
        dropout=0.0,
    ),
}
NOT_PACKABLE: dict[str, PretrainedConfig] = {
    "falcon": FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    ),
    "falcon alibi": FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, initializer_range=0.2
    ),
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    "gemma2": Gemma2Config(**LLAMA_LIKE, attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
}


def build(config: PretrainedConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def logits(model: Any, lengths: list[int], tokens: Tensor, *, packed: bool) -> Tensor:
    """(tokens, vocabulary) of documents of these lengths: in one pack, or each alone on the ordinary path."""
    pieces = tokens.split(lengths)
    with torch.no_grad():
        if packed:
            return attention.logits_of(model, list(pieces))
        return torch.cat([model(input_ids=piece[None], use_cache=False).logits[0] for piece in pieces])


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_logits_equal_the_models_own_unpacked_path(name: str) -> None:
    # experts are multiplied in groups, which torch has no fp64 kernel for
    dtype, bound = (torch.float32, 5e-5) if name == "mixtral" else (torch.float64, 2e-6)
    model = build(PACKABLE[name]).to(dtype)
    tokens = torch.randint(0, 64, (24,), generator=torch.Generator().manual_seed(0))
    wanted = logits(model, [11, 1, 12], tokens, packed=False)  # before install: transformers' own attention
    assert install(model) is None
    assert cannot_pack(model) is None
    torch.testing.assert_close(logits(model, [11, 1, 12], tokens, packed=True), wanted, rtol=0, atol=bound)


def test_the_sliding_window_is_felt_within_a_document() -> None:
    """Mistral with a window of 4: token 0 reaches the output at 3 in one layer's attention, and not at 4."""
    config = MistralConfig(**{**LLAMA_LIKE, "num_hidden_layers": 1}, sliding_window=4)
    model = build(config)
    assert install(model) is None
    one = torch.randint(1, 64, (8,), generator=torch.Generator().manual_seed(0))
    other = torch.cat([one.new_zeros(1), one[1:]])
    changed = (logits(model, [8], one, packed=True) != logits(model, [8], other, packed=True)).any(1)
    assert changed.tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("name", NOT_PACKABLE)
def test_a_model_that_does_more_than_plain_attention_is_detected(name: str) -> None:
    model = build(NOT_PACKABLE[name])
    why = install(model) or cannot_pack(model)
    assert why is not None
    assert "\n" not in why


def test_a_model_that_leaks_between_documents_is_detected(llama: nn.Module) -> None:
    assert install(llama) is None
    attention.AttentionInterface.register(attention.NAME, attention.sdpa_attention_forward)
    try:
        why = cannot_pack(llama)
    finally:
        assert install(llama) is None
    assert why is not None
    assert "a document sees the one before it" in why
    assert cannot_pack(llama) is None


def test_a_model_whose_positions_do_not_restart_is_detected(gpt2: Any) -> None:
    """Isolated, yet not what it is alone: the second check finds it."""
    assert install(gpt2) is None
    gpt2.transformer.wpe.register_forward_pre_hook(
        lambda module, args: (torch.arange(args[0].numel()).view(args[0].shape) if args[0].numel() else args[0],)
    )
    why = cannot_pack(gpt2)
    assert why is not None
    assert "packed logits differ from separate ones" in why


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_does_not_pass_for_exact(value: float, llama: Any) -> None:
    assert install(llama) is None
    nn.init.constant_(llama.model.norm.weight, value)
    assert cannot_pack(llama) is not None


def test_trying_draws_nothing_and_changes_nothing(llama: Any) -> None:
    assert install(llama) is None
    before, modes = torch.get_rng_state(), [m.training for m in llama.modules()]
    cannot_pack(llama)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in llama.modules()] == modes
    assert all(p.grad is None for p in llama.parameters())


def test_without_boundaries_it_is_transformers_own_sdpa(model: Any, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    with torch.no_grad():
        wanted = model(input_ids=tokens, attention_mask=mask).logits
        assert install(model) is None
        assert torch.equal(model(input_ids=tokens, attention_mask=mask).logits[0, :7], wanted[0, :7])


def test_generation_with_a_cache_is_unchanged(model: Any) -> None:
    prompt = torch.tensor([[1, 2, 3, 4]])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert install(model) is None
    assert torch.equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), **options), before)


def plain(
    q: Tensor, k: Tensor, v: Tensor, edges: list[int], scale: float, window: int | None, prefix: Tensor | None = None
) -> Tensor:
    """softmax(q [P_K; K]ᵀ · scale) [P_V; V] with one mask over all documents, written out: (1, tokens, heads, width).

    ``prefix`` (2, kv heads, k, width) is in sight of every token; without one there are no P_K and P_V.
    """
    tokens = q.shape[2]
    document = torch.bucketize(torch.arange(tokens), torch.tensor(edges[1:-1]), right=True)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    allowed = (document[:, None] == document) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    if prefix is not None:
        allowed = torch.cat([torch.ones(tokens, prefix.shape[2], dtype=torch.bool), allowed], dim=1)
        k, v = torch.cat([prefix[:1], k], dim=2), torch.cat([prefix[1:], v], dim=2)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_function_is_masked_softmax_attention_with_its_gradients(kv_heads: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    make: Callable[[int], Tensor] = lambda heads: torch.randn(  # noqa: E731
        1, heads, 17, 8, generator=generator, dtype=torch.float64
    ).requires_grad_()
    q, k, v = make(4), make(kv_heads), make(kv_heads)
    edges = [0, 5, 6, 17]
    wanted = plain(q, k, v, edges, 0.3, window)
    found, weights = attention.attention(
        nn.Module(), q, k, v, None, torch.tensor(edges), scaling=0.3, sliding_window=window
    )
    assert weights is None
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    grad = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad(y, [q, k, v], grad) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("edges", [[0, 5, 6, 17], [0, 17], None])
def test_a_prefix_stands_before_every_document_and_every_row(
    kv_heads: int, window: int | None, edges: list[int] | None
) -> None:
    """Packed, one document, and a row (whose window transformers writes into the mask), with gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, prefix = (
        torch.randn(batch, heads, n, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for batch, heads, n in ((1, 4, 17), (1, kv_heads, 17), (1, kv_heads, 17), (2, kv_heads, 3))
    )
    module: Any = nn.Module()
    module.layer_idx, module.num_key_value_groups, mask = 1, 4 // kv_heads, None
    if edges is None and window is not None:
        distance = torch.arange(17)[:, None] - torch.arange(17)
        mask = ((distance >= 0) & (distance < window))[None, None]
    boundaries = None if edges is None else torch.tensor(edges)
    found, _ = attention.attention(
        module, q, k, v, mask, boundaries, {1: prefix}, scaling=0.3, sliding_window=edges and window
    )
    wanted = plain(q, k, v, edges or [0, 17], 0.3, window, prefix)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    grad = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    inputs = [q, k, v, prefix]
    for one, other in zip(*(torch.autograd.grad(y, inputs, grad) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_prefix_of_another_shape_than_the_keys_is_refused() -> None:
    q, module = torch.randn(1, 4, 5, 8), nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="layer 0 keeps 4 heads of 8, the prefix is of 2 of 8"):
        attention.attention(module, q, q, q, None, None, {0: torch.randn(2, 2, 3, 8)})


@pytest.mark.parametrize(
    "extra", [{"softcap": 5.0}, {"s_aux": torch.ones(4)}, {"position_bias": torch.ones(1)}, {"is_causal": False}]
)
def test_what_it_cannot_compute_it_refuses(extra: dict[str, Any]) -> None:
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(NotPackable):
        attention.attention(nn.Module(), q, q, q, None, torch.tensor([0, 5]), **extra)
