"""Whether a step's loss stands out from those before it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WINDOW = 32  # losses that a new one is held against
FEW = 12  # with fewer nothing can be said
DEVIATIONS = 8.0  # standard deviations, of normal losses
SHARE = 0.1  # of the median, so that a loss that hardly moves is no spike when it does


def spike(recent: Sequence[float], loss: float) -> bool:
    """Robust: median and median absolute deviation, which a spike among ``recent`` does not move."""
    if len(recent) < FEW:
        return False
    middle = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(one - middle) for one in recent)
    return loss - middle > max(DEVIATIONS * deviation, SHARE * abs(middle))
