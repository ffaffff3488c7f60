"""Compiled blocks: one graph each, whatever the number of tokens, with the numbers and names of the others."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from lowrank.data.pack import pad
from lowrank.fast import block
from lowrank.fast.compile import compile_blocks
from tests.documents import texts
from tests.fast.passes import BLOCKS, adapted, agree, trained

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")),
    ],
)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_block_is_one_graph_for_any_number_of_tokens(fused: bool, backend: str, llama: Any) -> None:
    """Of padded rows: on a CPU a pack's attention goes document by document, in Python."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, first = adapted(llama), pad(texts((7, 12, 3, 9)))
    if fused:
        block.fuse(model)
    names, wanted = list(model.state_dict()), trained(model, first)[1]
    assert compile_blocks(model, backend) == f"{BLOCKS}/{BLOCKS} blocks compiled, in the first step"
    agree(trained(model, first)[1], wanted, 1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for lengths in ((5, 12, 3), (5, 17), (8, 4, 2, 2, 6)):
        trained(model, pad(texts(lengths)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == BLOCKS
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(model.state_dict()) == names
