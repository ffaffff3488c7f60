"""Which way a figure is better."""

from __future__ import annotations

HIGHER = ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "tokens_per_s", "accuracy", "exact_match", "f1")
# The costs against which quality is weighed.
COSTS = ("trainable_parameters", "peak_memory_mb", "seconds")


def higher_is_better(metric: str) -> bool:
    """By the name's parts: scores, gains and speeds, yes; losses, sizes, times and whatever is unknown, no."""
    return any(part in HIGHER or part.endswith("_gain") for part in metric.split("."))
