"""The methods that work layer by layer or block by block, as a user picks them: adapter=NAME over any base."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from cli import SMALL, write_rows

import lowrank
from lowrank.adapters import store
from lowrank.assemble import parts
from lowrank.compose import compose
from lowrank.errors import ConfigError

METHODS = ("ia3", "bottleneck", "bitfit", "loha", "lokr", "oft")
SITES = {  # of two layers each
    "tiny_llama": {"ia3": 2 * 3, "bottleneck": 2, "loha": 2 * 7, "lokr": 2 * 7, "oft": 2 * 7},
    "tiny_gpt2": {"ia3": 2 * 2, "bottleneck": 2, "bitfit": 2 * 6 + 1, "loha": 2 * 4, "lokr": 2 * 4, "oft": 2 * 4},
}
RUNS = {
    "ia3": ("model=tiny_gpt2", "quant=nf4"),
    "bottleneck": ("model=tiny_llama", "loop.gradient_checkpointing=true"),
    "bitfit": ("model=tiny_gpt2", "quant=nf4"),
    "lokr": ("model=tiny_llama", "quant=nf4", "adapter.r=2"),
}


pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(("model", "quant", "method"), [*product(SITES, ("none", "nf4"), METHODS)])
def test_it_is_planned_with_its_own_settings_or_refused(model: str, quant: str, method: str) -> None:
    config = compose([f"model={model}", f"quant={quant}", f"adapter={method}"])
    if method in SITES[model]:
        assert len(parts(config).plan.rows) == SITES[model][method]
        return
    with pytest.raises(ConfigError, match=r"'\*\.bias' matches no parameter of this LlamaForCausalLM"):
        parts(config)


@pytest.mark.parametrize(
    ("given", "taken"),
    [("q_proj", "q_proj"), ("[q_proj,k_proj]", ["q_proj", "k_proj"]), ("{q_proj: {}}", {"q_proj": {}})],
)
def test_targets_of_the_users_own_take_the_place_of_a_mapping_in_the_yaml(given: str, taken: object) -> None:
    assert compose(["adapter=ia3", f"adapter.targets={given}"]).adapter.targets == taken


@pytest.mark.parametrize("method", RUNS)
def test_it_trains_and_what_it_learnt_is_there_when_the_run_is_opened(method: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    settings = (f"adapter={method}", *RUNS[method], "loop.steps=12", "optim.lr=0.02", "eval.generate.limit=0")
    done = lowrank.train([*SMALL, f"data.path={rows}", *settings], tmp_path / "run")
    losses = [row["loss"] for row in done.metrics if row["event"] == "step"]
    assert sum(losses[-3:]) < sum(losses[:3])
    _, tensors = store.read(tmp_path / "run" / "adapter")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    ids = torch.tensor([[72, 101, 108, 108, 111]])
    opened = lowrank.open(str(tmp_path / "run"))
    with torch.no_grad():
        assert torch.equal(opened.model(input_ids=ids).logits, done.model(input_ids=ids).logits)
