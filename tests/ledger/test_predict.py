"""The prediction against the run's own tensors, FLOPs against torch's counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deep import parts_and_data
from small import real, saved_by_a_step
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lowrank import assemble
from lowrank.data.pack import pack
from lowrank.ledger import bare, predict, step
from lowrank.ledger.predict import over_blocks, segments
from lowrank.ledger.resident import by_part
from lowrank.ledger.shapes import of_data, share, text, texts

aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("cache")
CASES = [
    ("llama", "lora", "true"),
    ("llama", "lora", "false"),
    ("llama", "full", "true"),
    ("llama", "bottleneck", "true"),
    ("llama", "prefix", "true"),
    ("gpt2", "lora", "true"),
    ("gpt2", "prompt", "false"),
]


@pytest.mark.parametrize(("kind", "adapter", "fast"), CASES)
def test_activations_are_what_autograd_keeps(tmp_path: Path, kind: str, adapter: str, fast: str) -> None:
    parts, data = parts_and_data(tmp_path, f"adapter={adapter}", f"loop.fast={fast}", "loop.steps=4", kind=kind)
    ledger = predict(parts, data)
    batch = pack(texts(ledger.shape.step, ledger.shape.targets))
    assert ledger.parts["activations"] == pytest.approx(saved_by_a_step(parts, batch), rel=0.03)


@pytest.mark.parametrize("mode", ["off", "selective", "block"])
def test_of_fewer_blocks_the_whole_model_is_known(tmp_path: Path, mode: str) -> None:
    parts, data = parts_and_data(tmp_path, f"loop.gradient_checkpointing={mode}")
    model = bare.build(parts)
    assemble.quickened(parts, model.model)
    shape = of_data(parts, data, packed=True)
    found = over_blocks(model, lambda kept: step.trained(model, kept, parts, shape.step, shape.targets))
    with model.only(model.runs):
        whole = step.trained(model, model.runs, parts, shape.step, shape.targets)
    assert model.runs == (6,)
    assert {name: segments(whole)[name] for name in segments(found)} == segments(found)
    assert found[step.FLOPS, "forward"] == whole[step.FLOPS, "forward"]
    assert found[step.FLOPS, "backward"] == whole[step.FLOPS, "backward"]


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("llama", "lora"), ("llama", "full"), ("gpt2", "lora"), ("gpt2", "bottleneck"), ("llama", "ia3")],
)
def test_flops_are_those_of_torchs_counter(tmp_path: Path, kind: str, adapter: str) -> None:
    parts, data = parts_and_data(
        tmp_path, f"adapter={adapter}", "loop.fast=false", "data.max_length=128", "data.on_empty=drop", kind=kind
    )
    ledger = predict(parts, data)
    model = real(parts)
    batch = pack([text(128, round(share(data) * 128))])
    with FlopCounterMode(display=False, custom_mapping=CPU) as counter:
        assemble.loss(parts.config)(model, batch).backward()
    assert ledger.flops_per_token["total"] == pytest.approx(counter.get_total_flops() / 128, rel=1e-12)


def heads(q: torch.Size, k: torch.Size) -> tuple[int, ...]:
    return (k[0], q[1], k[2], k[3])


CPU = {  # torch's own formulas, for the kernel of CPUs that its table leaves out
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, heads(q, k), heads(q, v)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, heads(q, k), heads(q, v)
    ),
}


@pytest.mark.parametrize("overrides", [("quant=nf4",), ("adapter=full",), ("adapter=vera",)])
def test_what_lies_in_memory_is_what_the_loaded_model_has(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    parts, data = parts_and_data(tmp_path, *overrides)
    ledger = predict(parts, data)
    there = by_part(real(parts))
    assert {name: ledger.parts[name] for name in there} == there


def test_without_data_every_text_is_as_long_as_may_be(tmp_path: Path) -> None:
    parts, _ = parts_and_data(tmp_path, "data.max_length=96")
    ledger = predict(parts, None)
    assert ledger.shape.step == (96, 96)
    assert "data.max_length" in str(ledger)
