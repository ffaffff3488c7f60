"""q, k and v read one x: outside fused blocks too it is kept once, whatever the method, the precision and the base."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank.adapters import IA3, OFT, AdaLoRA, DoRA, LoHa, LoKr, LoRA, VeRA
from lowrank.adapters.inject import apply
from lowrank.adapters.plan import plan
from lowrank.keys import Clock
from lowrank.quant.convert import quantize

R = 4
# What a site keeps a token besides x itself, in numbers: A x, of rank R; for a gradient of y's scale, y (out wide).
METHODS: dict[str, tuple[Any, int, bool]] = {  # factory, numbers of rank, whether y is kept
    "lora": (partial(LoRA, r=R), R, False),
    "dora": (partial(DoRA, r=R), R, True),
    "adalora": (partial(AdaLoRA, init_r=R, target_r=R), R, False),
    "loha": (partial(LoHa, r=2), R, False),
    "lokr": (partial(LoKr, r=2), 0, False),
    "lokr whole": (partial(LoKr, r=64), 0, False),
    "ia3 inputs": (partial(IA3, feedforward=True), 0, False),
    "oft": (partial(OFT, block_size=4), 0, False),
    "vera": (partial(VeRA, r=R), R, False),
    "lora fa": (partial(LoRA, r=R, freeze_a=True), R, False),
    "ia3": (partial(IA3), 0, True),
}
WITHOUT_X = ("vera", "lora fa", "ia3")  # no gradient of theirs needs x
DROPPING = ("lora", "dora", "adalora", "vera", "lora fa")
CASES = [(name, case) for name in METHODS for case in ("fp32", "bf16 autocast", "bf16", "nf4")]
CASES += [(name, "dropout") for name in DROPPING]


def kept(model: Any, tokens: int, dtype: torch.dtype, autocast: bool) -> int:
    """Bytes between forward and backward of the first layer's q, k and v, each storage once and no parameter's."""
    attention = model.model.layers[0].self_attn
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []  # so that no address is used twice
    x = torch.randn(1, tokens, model.config.hidden_size, requires_grad=True).to(dtype) * 1  # (1, tokens, d)
    context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        y = [site(x) for site in (attention.q_proj, attention.k_proj, attention.v_proj)]
    torch.autograd.backward(y, [torch.ones_like(each) for each in y])
    return sum(storages.values())


@pytest.mark.parametrize(("name", "case"), CASES)
def test_an_input_that_three_sites_read_is_kept_once(name: str, case: str, llama: Any) -> None:
    factory, rank, output = METHODS[name]
    if case == "dropout":
        factory = partial(factory, dropout=0.1)
    llama.requires_grad_(False)
    if case == "nf4":
        quantize(llama)
    clock = Clock(0)
    apply(llama, plan(llama, {"*.self_attn.[qkv]_proj": factory}), clock=clock)
    llama.train()
    clock.set(1, 0)
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    if case == "bf16":
        llama.to(dtype)
    few, many = (kept(llama, tokens, dtype, case == "bf16 autocast") for tokens in (64, 192))
    config = llama.config
    x = 0 if name in WITHOUT_X else config.hidden_size * dtype.itemsize
    out = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    computed = 4 if case in ("fp32", "nf4", "dropout") else 2  # bytes of a number that a product makes
    ranks = 2 if (name, case) == ("dora", "dropout") else 1  # its second product, of the dropped x, has one more
    assert (many - few) / 128 == x + computed * (3 * rank * ranks + out * output)
