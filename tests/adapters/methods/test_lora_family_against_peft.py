"""LoRA's initialisations, DoRA and VeRA beside PEFT's: the same start, outputs and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from beside_peft import IDS, check_same_as_peft, peft_of
from peft import LoraConfig, VeraConfig
from torch import Tensor, nn

from lowrank.adapters import DoRA, LoRA, VeRA
from lowrank.adapters.inject import apply
from lowrank.adapters.methods.dropout import Dropped
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import adapted
from lowrank.keys import Clock
from lowrank.models.tiny import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")

MODELS = {
    "llama": (tiny_llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "gpt2": (tiny_gpt2, ["c_attn", "c_fc", "c_proj"]),
}


def lora_config(targets: list[str], **options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)


def bare(build: Callable[[], Any]) -> Any:
    base = build().requires_grad_(False)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


def factors(layer: Any) -> dict[str, Tensor]:
    if "default" in layer.lora_embedding_A:
        found = {"A": layer.lora_embedding_A["default"], "B": layer.lora_embedding_B["default"]}
    else:
        found = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    if "default" in layer.lora_magnitude_vector:
        found["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return found


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_drawn_factors_are_of_pefts_size(init: Any) -> None:
    layer = nn.Sequential(nn.Linear(2000, 1000))
    ours = LoRA(layer[0], generator=torch.Generator().manual_seed(0), r=16, init=init)
    theirs = factors(peft_of(layer, LoraConfig(r=16, target_modules=["0"], init_lora_weights=init)).base_model.model[0])
    for name in ("A", "B"):
        mine = ours.get_parameter(name).detach()
        assert float(mine.std()) == pytest.approx(float(theirs[name].detach().std()), rel=0.05)


# PEFT's olora takes Conv1D's weight the wrong way round and fails on GPT-2.
@pytest.mark.parametrize(("kind", "init"), [("llama", "pissa"), ("gpt2", "pissa"), ("llama", "olora")])
def test_what_starts_from_the_weight_is_pefts_and_so_is_what_it_computes(kind: str, init: Any) -> None:
    build, targets = MODELS[kind]
    base = bare(build)
    theirs = peft_of(copy.deepcopy(base), lora_config(targets, init_lora_weights=init))
    made = plan(base, dict.fromkeys(targets, partial(LoRA, r=4, alpha=6, init=init)))
    layers = {row.path: theirs.base_model.model.get_submodule(row.path) for row in made.rows}
    for path, site in adapted(apply(copy.deepcopy(base), made)):
        mine, its = dict(site.adapter.named_parameters()), factors(layers[path])
        torch.testing.assert_close(mine["B"] @ mine["A"], its["B"] @ its["A"], rtol=0, atol=1e-5)
        for name in ("A", "B"):  # of a singular vector the sign is free
            torch.testing.assert_close(mine[name].abs(), its[name].abs(), rtol=0, atol=1e-4)
    state = {
        f"{path}.adapter.{name}{taken}": value
        for path, layer in layers.items()
        for name, value in factors(layer).items()
        for taken in ("", "0")
    }
    ours = apply(base, made, state=state).double()
    theirs.double()
    one, other = ours(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-5)
    one.loss.backward()
    other.loss.backward()
    for path, site in adapted(ours):
        its = factors(layers[path])
        for name, parameter in site.adapter.named_parameters():
            assert parameter.grad is not None
            assert its[name].grad is not None
            torch.testing.assert_close(parameter.grad, its[name].grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", [*MODELS, "embedding"])
def test_dora_computes_what_pefts_does(kind: str, rslora: bool) -> None:
    build, targets = MODELS.get(kind, (tiny_llama, ["embed_tokens"]))
    rules = dict.fromkeys(targets, partial(DoRA, r=4, alpha=6, rslora=rslora))
    check_same_as_peft(build, rules, lora_config(targets, use_dora=True, use_rslora=rslora), factors)


class Replayed(nn.Module):
    """Dropout at given positions, in PEFT's place for it."""

    def __init__(self, p: float, seed: int) -> None:
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x: Tensor) -> Tensor:
        return Dropped.apply(x, self.p, self.seed)


def test_doras_dropout_is_pefts() -> None:
    base, clock = nn.Sequential(nn.Linear(24, 16)).double(), Clock(3)
    clock.set(2, 0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, lora_dropout=0.3)
    theirs = peft_of(copy.deepcopy(base), config).train()
    ours = apply(base, plan(base, {"0": partial(DoRA, r=4, alpha=6, dropout=0.3)}), clock=clock).double().train()
    site, layer = dict(adapted(ours))["0"], theirs.base_model.model[0]
    layer.lora_dropout["default"] = Replayed(0.3, clock.draw(site.adapter.group))
    theirs.double()
    its, mine = factors(layer), dict(site.adapter.named_parameters())
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).double())
            its[name].copy_(parameter)
    x, weights = torch.randn(2, 7, 24).double().requires_grad_(), torch.randn(2, 7, 16).double()
    found = torch.autograd.grad((ours(x) * weights).sum(), [x, *mine.values()])
    wanted = torch.autograd.grad((theirs(x) * weights).sum(), [x, *(its[name] for name in mine)])
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", MODELS)
def test_vera_computes_what_pefts_does(kind: str) -> None:
    build, targets = MODELS[kind]
    base = bare(build)
    config = VeraConfig(r=8, d_initial=0.3, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft_of(copy.deepcopy(base), config).double()
    ours = apply(base, plan(base, dict.fromkeys(targets, partial(VeRA, r=8, d_initial=0.3)))).double()
    pairs = []
    for path, site in adapted(ours):
        layer, mine = theirs.base_model.model.get_submodule(path), dict(site.adapter.named_parameters())
        assert mine["A"].shape == layer.vera_A["default"].shape
        assert mine["B"].shape == layer.vera_B["default"].shape
        assert float(mine["A"].abs().max()) == pytest.approx(float(layer.vera_A["default"].abs().max()), rel=0.05)
        pairs += [(mine["b"], layer.vera_lambda_b["default"]), (mine["d"], layer.vera_lambda_d["default"])]
        with torch.no_grad():
            assert torch.equal(*pairs[-1])
            assert torch.equal(*pairs[-2])
            pairs[-2][0].add_(0.2)
            pairs[-2][1].add_(0.2)
            mine["A"].copy_(layer.vera_A["default"])
            mine["B"].copy_(layer.vera_B["default"])
    one, other = ours(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    assert (one.logits - other.logits).abs().max() <= 1e-11
    one.loss.backward()
    other.loss.backward()
    for parameter, its in pairs:
        assert parameter.grad is not None
        assert its.grad is not None
        assert parameter.grad.abs().max() > 0
        assert (parameter.grad - its.grad).abs().max() <= 1e-11
