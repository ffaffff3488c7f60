"""What the choices of conf/optim compute, as their papers write it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank.assemble import optimizer
from lowrank.compose import compose
from lowrank.keys import key

STEPS = 4


def gradients() -> list[Tensor]:
    """Of changing size, so that both averages matter."""
    return [torch.randn(3, 5, generator=key(0, step), dtype=torch.float64) * 3.0**step for step in range(STEPS)]


def moved(weight: Tensor, lr: float, decay: float) -> Tensor:
    """AdamW (arXiv 1711.05101, algorithm 2) with β₁ = 0.9, β₂ = 0.999 and ε = 1e-8, in fp64."""
    w, m, v = weight.double(), torch.zeros(3, 5).double(), torch.zeros(3, 5).double()
    for t, g in enumerate(gradients(), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - lr * ((m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + decay * w)
    return w


@pytest.mark.parametrize("choice", ["adamw", "adamw8bit", "lora_plus"])
def test_the_choices_of_adam_step_as_the_papers_algorithm_with_its_constants(choice: str) -> None:
    """In 8 bits too: so small a tensor keeps its state whole."""
    overrides = ["optim.lr=1e-2", "optim.weight_decay=0.1", *(["optim.groups=[]"] if choice == "lora_plus" else [])]
    layer = nn.Linear(5, 3, bias=False)
    expected = moved(layer.weight.detach(), 1e-2, 0.1)
    made = optimizer(compose([f"optim={choice}", *overrides]).optim, layer)
    for gradient in gradients():
        layer.weight.grad = gradient.float()
        made.step()
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_sgd_is_that_with_a_momentum_of_nine_tenths() -> None:
    layer = nn.Linear(5, 3, bias=False)
    w, velocity = layer.weight.detach().double(), torch.zeros(3, 5).double()
    made = optimizer(compose(["optim=sgd", "optim.lr=1e-2"]).optim, layer)
    for gradient in gradients():
        velocity = 0.9 * velocity + gradient
        w = w - 1e-2 * velocity
        layer.weight.grad = gradient.float()
        made.step()
    torch.testing.assert_close(layer.weight.detach().double(), w, rtol=1e-5, atol=1e-7)
