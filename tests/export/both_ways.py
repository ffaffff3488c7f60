"""Our models and PEFT's with adapters that do something, and what their folders say."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import plan
from lowrank.keys import key

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.randint(0, 256, (2, 12), generator=key(0, "ids"))

QUIET = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*deprecated:FutureWarning",  # of what peft asks transformers for
        "Model has `tie_word_embeddings=True` and a tied layer",
        "fan_in_fan_out is set to",
        "Setting `save_embedding_layers` to `True`",
        "Specified to not",  # save VeRA's projection, which is then drawn from its key
        "Adapter 'default'. . LoRA tensor",  # of AdaLoRA: a site without a triplet left
        "Initializing zero-element tensors",
        "PiSSA changes the base weights",  # peft's own conversion meets it
        "The following rank_pattern keys did not match",  # of AdaLoRA they never do
    )
]


@torch.no_grad()
def drawn(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=key(0, "drawn", name)).to(parameter))


def with_adapter(bare: nn.Module, rules: Mapping[str, Any]) -> Any:
    model = copy.deepcopy(bare)
    apply(model, plan(model, rules))
    drawn(named_trainable(model))
    return model.eval()


def of_peft(bare: nn.Module, method: str, **options: Any) -> Any:
    settings = getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", **options)
    theirs = get_peft_model(copy.deepcopy(bare), settings)
    drawn({name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad})
    return theirs.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of the tokens: PEFT's prompt has some of its own before them."""
    found: Tensor = model(input_ids=IDS).logits
    return found[:, -IDS.shape[1] :]


def apart(one: Any, other: Any) -> float:
    """The largest difference of two models' logits."""
    return float((logits(one) - logits(other)).abs().max())


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found
