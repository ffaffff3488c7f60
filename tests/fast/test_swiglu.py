"""The block that keeps two tensors for three: the plain block's numbers, gradients and names."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lowrank.adapters import LoRA
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.merge import merge
from lowrank.adapters.plan import plan
from lowrank.fast import linear, swiglu
from lowrank.keys import key


def gradients(model: LlamaForCausalLM, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits, gradients, and the bytes kept between forward and backward."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=tokens).logits
    logits.square().mean().backward()
    found = {name: p.grad.clone() for name, p in named_trainable(model).items() if p.grad is not None}
    return logits.detach(), found, sum(t.untyped_storage().nbytes() for t in kept.values())


def test_logits_gradients_and_a_third_of_the_block_less_memory(llama: LlamaForCausalLM) -> None:
    tokens = torch.arange(12)[None]
    apply(llama.double(), plan(llama, {"all-linear": partial(LoRA, r=4)}))
    for name, parameter in named_trainable(llama).items():
        parameter.data.normal_(0, 0.1, generator=key(1, name))
    logits, plain, bytes_plain = gradients(llama, tokens)
    layers, width = llama.config.num_hidden_layers, llama.config.intermediate_size
    assert swiglu.fuse(llama) == layers
    fused_logits, fused, bytes_fused = gradients(llama, tokens)
    assert torch.equal(fused_logits, logits)
    for name, gradient in fused.items():
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-12)
    assert bytes_plain - bytes_fused == 8 * 12 * width * layers
    merged, _ = merge(llama)
    torch.testing.assert_close(merged(input_ids=tokens).logits, logits, rtol=0, atol=1e-6)
    linear.unfuse(llama)
    assert gradients(llama, tokens)[2] == bytes_plain


def test_other_blocks_are_left_alone(gpt2: GPT2LMHeadModel) -> None:
    assert swiglu.fuse(gpt2) == 0
