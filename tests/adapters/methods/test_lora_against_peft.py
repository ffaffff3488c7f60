"""Our LoRA and PEFT's with the same values: the same logits, loss and gradients in fp64."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lowrank.adapters import LoRA
from lowrank.adapters.inject import apply
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import adapted
from lowrank.keys import key
from lowrank.models.tiny import tiny_gpt2, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]

IDS = torch.randint(0, 256, (2, 16), generator=key(0, "ids"))
CASES = {
    "llama": (tiny_llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], False),
    "llama, rslora": (tiny_llama, ["q_proj", "v_proj"], True),
    "llama, embedding and head": (tiny_llama, ["embed_tokens", "lm_head"], False),
    "gpt2": (tiny_gpt2, ["c_attn", "c_fc", "c_proj"], False),
    "gpt2, embeddings": (tiny_gpt2, ["wte", "wpe", "c_attn"], True),
}


def pair(build, targets, rslora):
    """Ours and PEFT's over one base in fp64, with the same A and B at each site."""
    base = build().double().requires_grad_(False)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    options = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(base), options).double().train()
    mine = partial(LoRA, r=4, alpha=6, rslora=rslora)
    ours = apply(base, plan(base, dict.fromkeys(targets, mine)))
    ours = ours.double().train()
    factors = {}
    for path, module in adapted(ours):
        A, B = factors_of(theirs.base_model.model.get_submodule(path))
        for name, a, b in (("A", module.adapter.A, A), ("B", module.adapter.B, B)):
            with torch.no_grad():
                a.copy_(0.1 * torch.randn(a.shape, generator=key(0, path, name), dtype=torch.float64))
                b.copy_(a)
            factors[f"{path}.{name}"] = (a, b)
    return ours, theirs, factors


def factors_of(layer):
    """PEFT's A (r, in) and B (out, r) of a site."""
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize(("build", "targets", "rslora"), CASES.values(), ids=CASES)
def test_logits_loss_and_gradients_are_those_of_peft(build, targets, rslora):
    ours, theirs, factors = pair(build, targets, rslora)
    mine, its = ours(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    assert (mine.logits - its.logits).abs().max() <= 1e-12
    assert (mine.loss - its.loss).abs() <= 1e-12
    mine.loss.backward()
    its.loss.backward()
    for name, (a, b) in factors.items():
        assert a.grad.abs().max() > 0, name
        assert (a.grad - b.grad).abs().max() <= 1e-12, name
    trained = {id(p) for p in ours.parameters() if p.requires_grad}
    assert trained == {id(a) for a, _ in factors.values()}
    assert sum(p.requires_grad for p in theirs.parameters()) == len(trained)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_ten_steps_of_adamw_end_where_peft_s_end(build):
    targets = {"tiny_llama": ["q_proj", "v_proj"], "tiny_gpt2": ["c_attn"]}[build.__name__]
    ours, theirs, factors = pair(build, targets, rslora=False)
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(10):
            rows = torch.randint(0, 256, (2, 16), generator=key(0, "rows", step))
            optimizer.zero_grad()
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
    for name, (a, b) in factors.items():
        assert (a - b).abs().max() <= 1e-6, name
