"""What a LoRA keeps for backward, and what it may write over."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lora_sites import BASES, IN, OUT, KeepsItsOutput, R, bias_of, saved_storages, wrap, x_of
from torch import Tensor, nn


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d", "nf4"])
def test_three_sites_that_read_one_input_keep_it_once(kind: str, precision: torch.dtype, dropout: float) -> None:
    sites = [wrap(BASES[kind]().requires_grad_(False), dropout=dropout).train() for _ in range(3)]
    x = x_of(50, IN, dtype=torch.float32)

    def call() -> list[Tensor]:
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            return [site(x) for site in sites]

    saved = saved_storages(call)
    weights = {p.untyped_storage().data_ptr() for site in sites for p in site.parameters()}
    activations = [t for pointer, t in saved.items() if pointer not in weights and t.numel() >= 50]
    wide = [t for t in activations if t.numel() > 50 * R and t.shape != (OUT, IN) and t.shape != (IN, OUT)]
    assert [t.data_ptr() for t in wide] == [x.data_ptr()]
    assert sum(t.numel() for t in activations if t.numel() == 50 * R) == 3 * 50 * R


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
def test_with_a_frozen_nothing_of_the_inputs_width_is_kept(kind: str) -> None:
    site, x = wrap(BASES[kind]().requires_grad_(False), freeze_a=True, dropout=0.3).train(), x_of(50, IN)
    saved = saved_storages(lambda: site(x.float()))
    weights = {p.untyped_storage().data_ptr() for p in site.parameters()}
    assert [t.shape for pointer, t in saved.items() if pointer not in weights and t.numel() >= 50] == [(50, R)]


def test_a_base_that_others_watch_is_not_written_in_place() -> None:
    x = x_of(5, IN)
    for watch in ("forward hook", "subclass"):
        base = (KeepsItsOutput if watch == "subclass" else nn.Linear)(IN, OUT).double().requires_grad_(False)
        seen: list[Tensor] = []
        base.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        wrap(base).double()(x)
        expected = F.linear(x, base.weight, bias_of(base))
        assert torch.equal(seen[0], expected)
        if isinstance(base, KeepsItsOutput):
            assert torch.equal(base.kept, expected)


def test_hooks_on_the_bases_gradient_work_and_see_what_they_would() -> None:
    x = x_of(5, IN)
    expected = torch.ones(5, OUT, dtype=torch.float64)
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        base = nn.Linear(IN, OUT).double().requires_grad_(False)
        seen: list[Tensor] = []
        getattr(base, register)(lambda module, *grads, seen=seen: seen.append(grads[-1][0]))
        wrap(base).double()(x).sum().backward()
        assert torch.equal(seen[0], expected)


def test_a_global_forward_hook_sees_the_bases_own_output() -> None:
    base, x, seen = nn.Linear(IN, OUT).double().requires_grad_(False), x_of(5, IN), []
    wrapped = wrap(base).double()
    hook = nn.modules.module.register_module_forward_hook(lambda m, _, out: seen.append(out) if m is base else None)
    try:
        wrapped(x)
    finally:
        hook.remove()
    assert torch.equal(seen[0], F.linear(x, base.weight, bias_of(base)))
