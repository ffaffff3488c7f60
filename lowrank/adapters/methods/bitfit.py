"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (arXiv 2106.10199)."""

from __future__ import annotations

from lowrank.adapters.methods.full import Full


class BitFit(Full):
    """y = W x + b', LayerNorm(x) = g ∘ x̂ + b': every bias b trains and nothing else does (section 3).

    ``Full`` with biases for targets: of what a target names, its biases alone. Over an NF4 base biases are dense, and
    train as over any other. A model that has none (Llama) is refused when the plan is made.
    """

    trains = "*.bias"
