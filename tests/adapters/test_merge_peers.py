"""What merging does to a small adapter, to the base and to a tied table: PEFT's figures beside ours, on one model."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import logits
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lowrank.adapters import LoRA
from lowrank.adapters.inject import apply
from lowrank.adapters.merge import merge
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import adapted
from lowrank.keys import key
from lowrank.models.quiet import quiet
from lowrank.models.tiny import tiny_llama
from lowrank.quant.convert import quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and the tied_target_modules"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear may get different generations"),
]

TEXT = torch.tensor(list((Path(__file__).parents[2] / "LICENSE").read_bytes()))  # the tiny models' tokens are bytes
ROWS = TEXT[: len(TEXT) // 64 * 64].view(-1, 64)
PROBE, TRAINING = ROWS[::6], torch.cat([ROWS[start::6] for start in range(1, 6)])
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_peft(base: Any, targets: list[str], size: float) -> Any:
    """PEFT's LoRA with drawn A and B, B of ``size``."""
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            spread = size if "lora_B" in name or "embedding_B" in name else 0.2
            parameter.data.copy_(spread * torch.randn(parameter.shape, generator=key(0, name)))
    return model


def with_ours(base: Any, theirs: Any, targets: list[str]) -> Any:
    """Our LoRA with the same values."""
    apply(base, plan(base, dict.fromkeys(targets, partial(LoRA, r=4, alpha=4))))
    for path, wrapped in adapted(base):
        site: Any = wrapped
        layer = theirs.base_model.model.get_submodule(path)
        for mine, of in ((site.adapter.A, layer.lora_A), (site.adapter.B, layer.lora_B)):
            mine.data.copy_(of["default"].weight)
    return base.eval()


def share(merged: Tensor, wrapped: Tensor, base: Tensor) -> float:
    return float(1 - (merged - wrapped).norm() / (wrapped - base).norm())


def four_bit(folder: Path) -> Any:
    """The model by bitsandbytes, on the plain kernel: the one for AVX-512 computes in bf16."""
    tiny_llama().save_pretrained(folder)
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )
    with quiet():
        return plain_kernel(AutoModelForCausalLM.from_pretrained(folder, quantization_config=options).eval())


def plain_kernel(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def slightly_trained(model: Any) -> Any:
    """20 small steps: its weights change by a per cent, its logits by a tenth."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    for step in range(20):
        rows = TRAINING[8 * step % len(TRAINING) :][:8]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_an_adapter_that_peft_loses_in_nf4_survives_here(tmp_path: Path) -> None:
    quantised = four_bit(tmp_path)
    base = logits(quantised, PROBE)
    theirs = slightly_trained(with_peft(quantised, LINEAR, size=0))
    ours = with_ours(quantize(tiny_llama()), theirs, LINEAR)
    wrapped = logits(theirs, PROBE)
    torch.testing.assert_close(logits(ours, PROBE), wrapped, rtol=0, atol=1e-5)
    kept = share(logits(plain_kernel(theirs.merge_and_unload()), PROBE), wrapped, base)
    _, naive = merge(ours, to="nf4", method="naive", min_share=None, probe=PROBE)
    _, best = merge(ours, to="nf4", probe=PROBE, calibration=TRAINING)
    print(f"share of a LoRA's effect merged into NF4: PEFT {kept:.3f}, naive {naive.share:.3f}, best {best.share:.3f}")
    assert kept < 0.1
    assert naive.share == pytest.approx(kept, abs=1e-3)  # the same rounding
    assert best.share is not None
    assert best.share > 0.5


def test_merging_and_unmerging_in_bf16_changes_pefts_base_and_not_ours() -> None:
    bare = tiny_llama().bfloat16().requires_grad_(False)
    theirs = with_peft(copy.deepcopy(bare), LINEAR, size=1)
    ours = with_ours(copy.deepcopy(bare), theirs, LINEAR)
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    sites = [path for path, _ in adapted(ours)]
    merge(ours, min_share=None)
    changed = {"PEFT": 0, "ours": 0}
    for path in sites:
        before = bare.get_submodule(path).weight
        changed["PEFT"] += int((theirs.base_model.model.get_submodule(path).base_layer.weight != before).sum())
        changed["ours"] += int((ours.get_submodule(path).base.weight != before).sum())
    total = sum(bare.get_submodule(path).weight.numel() for path in sites)
    print(f"base entries changed by merge and unmerge: PEFT {changed['PEFT'] / total:.1%}, ours {changed['ours']}")
    assert changed["PEFT"] > 0.5 * total
    assert changed["ours"] == 0


def test_merging_a_tied_head_changes_pefts_embeddings_and_not_ours() -> None:
    bare = tiny_llama().requires_grad_(False)
    table = bare.lm_head.weight.clone()
    theirs = with_peft(copy.deepcopy(bare), ["lm_head"], size=0.05)
    ours = with_ours(copy.deepcopy(bare), theirs, ["lm_head"])
    wrapped = logits(theirs, PROBE)
    torch.testing.assert_close(logits(ours, PROBE), wrapped, rtol=0, atol=1e-5)
    unloaded = theirs.merge_and_unload()
    merged, report = merge(ours, probe=PROBE)
    peft, mine = float((logits(unloaded, PROBE) - wrapped).abs().max()), report.logit_difference
    print(f"max |merged − wrapped| with LoRA on a tied head: PEFT {peft:.2e}, ours {mine:.2e}")
    assert not torch.equal(unloaded.get_input_embeddings().weight, table)
    assert torch.equal(merged.get_input_embeddings().weight, table)
    assert peft > 0.1
    assert mine is not None
    assert mine < 1e-4
