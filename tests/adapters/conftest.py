"""Every kind of site that takes a LoRA."""

from __future__ import annotations

import pytest
import torch
from lora_sites import BASES
from torch import nn


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return BASES[request.param]().requires_grad_(False)
