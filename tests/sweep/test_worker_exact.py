"""Every method, dense and NF4, in one worker and in processes of their own: the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli import SMALL, train
from serving import job, serving
from sweep.test_worker import outcome

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
METHODS = {
    "lora": ("adapter.dropout=0.1",),
    "pissa": ("adapter.init=pissa",),
    "adalora": ("adapter=adalora", "adapter.init_r=4", "adapter.target_r=2", "adapter.delta_t=1"),
    "dora": ("adapter=dora", "adapter.r=3"),
    "vera": ("adapter=vera",),
    "ia3": ("adapter=ia3",),
    "bottleneck": ("adapter=bottleneck",),
    "prefix": ("adapter=prefix",),
    "prompt": ("adapter=prompt",),
    "oft": ("adapter=oft",),
    "bitfit": ("adapter=bitfit",),
    "full": ("adapter=full", "optim.lr=1e-4"),
    "recomputed": ("loop.gradient_checkpointing=block", "loop.accumulate=2"),
    "averaged": ("loop.average=0.9", "optim=lora_plus"),
    "plain": ("loop.fast=false",),
}


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_jobs_of_a_worker_are_to_the_bit_those_of_processes_of_their_own(
    rows: Path, tmp_path: Path, quant: str, precision: str
) -> None:
    plain = ["model=tiny_gpt2", *SMALL, f"data.path={rows}", "loop.steps=4", "loop.micro_batch=3"]
    plain += [f"quant={quant}", f"loop.precision={precision}"]
    methods = {name: o for name, o in METHODS.items() if (name, quant) != ("full", "nf4")}
    if precision == "bf16":
        methods = {name: methods[name] for name in ("lora", "adalora", "prefix", "recomputed")}
    with serving(tmp_path / "output.log") as worker:
        for name, overrides in methods.items():
            [told] = worker.run(job(tmp_path / "kept" / name, *plain, *overrides))
            assert told["code"] == 0, told
    different = []
    for name, overrides in methods.items():
        assert train(*plain, *overrides, f"hydra.run.dir={tmp_path / 'alone' / name}").returncode == 0
        if outcome(tmp_path / "kept" / name) != outcome(tmp_path / "alone" / name):
            different.append(name)
    assert different == []
