"""All documents of a pack in one kernel: what the kernel is given, when it is taken, and on CUDA what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.models import attention, varlen

EDGES = torch.tensor([0, 5, 6, 17])


def as_documented(
    query: Tensor,  # (tokens, heads, width)
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's ``varlen_attn`` by its documentation: a window of (left, right), −1 for no bound."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q.tolist() == cu_seq_k.tolist()
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa or query.shape[1] == key.shape[1]
    k, v = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    tokens = torch.arange(len(query))
    document = torch.bucketize(tokens, cu_seq_q[1:-1].long(), right=True)
    ahead = tokens - tokens[:, None]  # (query, key)
    left, right = window_size
    seen = (document[:, None] == document) & (ahead <= right) & ((ahead >= -left) if left >= 0 else True)
    scores = torch.einsum("qhw,khw->hqk", query, k) * scale  # (heads, query, key)
    return torch.einsum("hqk,khw->qhw", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def without_groups(*args: Tensor, scale: float, window_size: tuple[int, int]) -> Tensor:
    """An older PyTorch's, which has no ``enable_gqa``."""
    return as_documented(*args, scale=scale, window_size=window_size)  # type: ignore[arg-type]


def inputs(kv_heads: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, heads, 17, 8, generator=generator, dtype=torch.float64) for heads in (4, kv_heads, kv_heads)]
    return [each.to(device, dtype).requires_grad_() for each in made]


def by_document(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    parts = [
        attention.document_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], window, {"scaling": 0.3})
        for a, b in ((0, 5), (5, 6), (6, 17))
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kernel", [as_documented, without_groups])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_it_is_asked_for_what_goes_document_by_document_elsewhere(
    kv_heads: int, window: int | None, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    q, k, v = inputs(kv_heads)
    found = varlen.attention(q, k, v, EDGES.clone(), window=window, scale=0.3)
    torch.testing.assert_close(found, by_document(q, k, v, window), rtol=0, atol=1e-12)


def test_boundaries_are_brought_to_the_device_once_a_pack() -> None:
    edges, other = EDGES.clone(), EDGES.clone()
    first, longest = varlen.on_device(edges, torch.device("cpu"))
    assert (first.tolist(), first.dtype, longest) == (EDGES.tolist(), torch.int32, 11)
    assert varlen.on_device(edges, torch.device("cpu"))[0] is first
    assert varlen.on_device(other, torch.device("cpu"))[0] is not first
    assert varlen.on_device(edges, torch.device("meta"))[0].is_meta


def test_on_a_cpu_it_is_never_taken() -> None:
    assert varlen.why_not(*inputs(2, torch.bfloat16)) == "it needs CUDA and compute capability 8.0"


def test_an_older_pytorch_goes_document_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", None)
    assert varlen.why_not(*inputs(2)) == "this PyTorch has no attention for variable lengths"
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, *, is_causal=False: query)
    assert varlen.why_not(*inputs(2)) == "this PyTorch has no attention for variable lengths"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_on_cuda_it_is_attention_by_document_within_half_precision(
    kv_heads: int, window: int | None, dtype: torch.dtype
) -> None:
    q, k, v = inputs(kv_heads, dtype, "cuda")
    assert varlen.why_not(q, k, v) is None
    found, _ = attention.attention(nn.Module(), q, k, v, None, EDGES.clone(), scaling=0.3, sliding_window=window)
    exact = [each.detach().cpu().double().requires_grad_() for each in (q, k, v)]
    wanted = by_document(exact[0], exact[1], exact[2], window)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=2e-2)
    grad = torch.ones_like(wanted)
    ours = torch.autograd.grad(found, [q, k, v], grad.to("cuda", dtype))
    for one, other in zip(ours, torch.autograd.grad(wanted, exact, grad), strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=5e-2)


@pytest.mark.cuda
def test_in_full_precision_cuda_goes_document_by_document_unless_autocast_says_otherwise() -> None:
    q, k, v = inputs(2, torch.float32, "cuda")
    assert varlen.why_not(q, k, v) == "it needs half precision"
    with torch.autocast("cuda", torch.bfloat16):
        assert varlen.why_not(q, k, v) is None
        found, _ = attention.attention(nn.Module(), q, k, v, None, EDGES.clone(), scaling=0.3)
    assert found.dtype == torch.bfloat16


@pytest.mark.cuda
def test_no_layer_waits_for_the_device() -> None:
    q, k, v = inputs(2, torch.bfloat16, "cuda")
    edges = EDGES.clone()
    attention.attention(nn.Module(), q, k, v, None, edges, scaling=0.3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = attention.attention(nn.Module(), q, k, v, None, edges, scaling=0.3)
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
