"""The two ways in which a loop's update may go."""

from __future__ import annotations

from collections.abc import Iterator

import loops
import pytest

from lowrank.train.flat import Flat
from lowrank.train.update import EachParameter


@pytest.fixture(params=[EachParameter, Flat], ids=["each parameter", "flat"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every loop that a test makes goes a parameter at a time, and in another run of the test over one memory."""
    loops.UPDATING.append(request.param)
    yield
    loops.UPDATING.pop()
