"""What a process keeps beside its tensors is bounded, however many shapes its products have."""

from __future__ import annotations

import json

import pytest
import torch
from cli import run

from lowrank.fast import heap

SCRIPT = """
import sys, torch
from lowrank.fast import heap
if sys.argv[1] == "bound":
    heap.bound()
weight = torch.randn(96, 64)
sizes = []
for rows in range(400):
    torch.ops.mkldnn._linear_pointwise(torch.randn(rows + 1, 64), weight, None, "none", [], "")
    sizes.append(heap.in_use())
print(sizes[199], sizes[399])
"""
glibc = pytest.mark.skipif(heap.glibc() is None, reason="not glibc")
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


def grown(how: str) -> int:
    """Bytes that two hundred products of new shapes leave, after as many others."""
    done = run("-c", SCRIPT, how)
    before, after = map(int, done.stdout.split())
    return after - before


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in this process may have set it, for the children too."""
    for name in heap.CACHES:
        monkeypatch.delenv(name, raising=False)


@glibc
@onednn
def test_products_of_new_shapes_leave_nothing_once_bounded() -> None:
    assert abs(grown("bound")) < 2**20
    assert grown("free") > 8 * 2**20


@glibc
def test_what_is_in_use_is_what_was_asked_for() -> None:
    before = heap.in_use()
    held = torch.empty(10_000_000)
    after = heap.in_use()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(held.nbytes, rel=0.01)


@glibc
def test_what_the_environment_says_goes_first() -> None:
    script = "import os; from lowrank.fast import heap; heap.bound(); print({n: os.environ[n] for n in heap.CACHES})"
    done = run("-c", script, LRU_CACHE_CAPACITY="7")
    assert json.loads(done.stdout.replace("'", '"')) == {
        "LRU_CACHE_CAPACITY": "7",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(heap.PRODUCTS),
    }
