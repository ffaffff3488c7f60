"""What a step must cost, from shapes alone: the formulas that the curves are drawn with.

T tokens a step, s document length, r rank. FLOPs count a multiplication and an addition as two.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shapes import Shape


@dataclass(frozen=True)
class Work:
    """FLOPs of a step, by the kernel that does them: they do not run at one speed."""

    products: float
    attention: float

    def seconds(self, slower: float = 1.0) -> float:
        """Up to a factor; ``slower``: how many times as long attention takes for a FLOP as a product does."""
        return self.products + slower * self.attention


def step(shape: Shape, tokens: int, s: float, r: int, share: float = 0.125, top: int | None = None) -> Work:
    """A LoRA step over a frozen base: 4N + 6r·Σ(in + out) + A a token, the head on ``share`` of them.

    Adapters on the ``top`` layers alone: backward stops below them, 2N + 2Vd + 2N_top (+ a third and two thirds of A).
    """
    trained = shape.layers if top is None else top
    layers = 2 * shape.layer * shape.layers + 2 * shape.layer * trained
    head = 4 * shape.vocabulary * shape.d * share
    lora = 6 * r * shape.rank_widths * trained
    causal = 2 * s * shape.d * (shape.layers + 2 * trained)  # 6·s·d·L where all train
    return Work(tokens * (layers + head + lora), tokens * causal)


def saved_bytes(shape: Shape, size: int = 4) -> int:
    """The least that a token leaves behind for backward without recomputing a product, over all layers: x, q, k, v, o,
    x′, gate, up in ``size`` bytes an entry; the statistics of attention (one a head) and of two norms in fp32."""
    wide = 4 * shape.d + 2 * shape.kv + 2 * shape.f
    return shape.layers * (size * wide + 4 * (shape.heads + 2))


def saved_beside(shape: Shape, share: float = 0.125, size: int = 4) -> float:
    """What a token leaves beside the layers: the last norm's input and its statistic, the angles of its position (sine
    and cosine), and on ``share`` of them the loss's gradient."""
    return size * (shape.d * (1 + share) + 2 * shape.d / shape.heads) + 4
