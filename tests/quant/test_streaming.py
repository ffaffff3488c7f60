"""Peak memory while a model is quantised from file: the 4-bit model, the largest dense layer, and a constant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONSTANT = 170e6  # bytes: work space of one layer's quantisation, allocator slack, code paged in
MEASURE = """
import json, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from lowrank.quant.convert import load_quantized, quantize, report

def status(field):
    [line] = [line for line in open("/proc/self/status") if line.startswith(field)]
    return 1024 * int(line.split()[1])

config = LlamaConfig(**json.loads(sys.argv[1]))
with torch.device("meta"):
    skeleton = LlamaForCausalLM(config).eval()
quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)))  # loads the library
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: importing has one of its own
before = status("VmRSS")
model = load_quantized(skeleton, [Path(sys.argv[2])], dtype=torch.float32)
peak = status("VmHWM") - before
held = {id(p): p.numel() * p.element_size() for p in model.parameters()}
print(json.dumps({"peak": peak, "held": sum(held.values()), "saved": report(model).before}))
"""
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[Path]:
    """A safetensors file of 420 MB, written piece by piece so that this process stays small."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        start, end = end, end + 4 * parameter.numel()
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    noise = torch.randn(2**18, generator=torch.Generator().manual_seed(0)).numpy().tobytes()  # 1 MiB
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for written in range(0, end, len(noise)):
            file.write(noise[: end - written])
    yield path
    path.unlink()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_streaming_stays_within_the_4_bit_model_and_one_dense_layer(weights: Path) -> None:
    command = [sys.executable, "-c", MEASURE, json.dumps(SIZES), str(weights)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found = json.loads(done.stdout.splitlines()[-1])
    largest = 4 * 1024 * 2816
    assert found["saved"] > 400e6
    assert found["peak"] <= found["held"] + largest + CONSTANT
