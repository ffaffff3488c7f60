"""What every tensor that trains was after a step, in a few digits that every bit of it decides."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from loops import loop_of, same, values
from torch import Tensor
from transformers import LlamaForCausalLM

from lowrank.train import digests as module
from lowrank.train.digests import Digests, digest_of_all, digests, unequal
from lowrank.train.metrics import read


def some() -> dict[str, Tensor]:
    return {
        "a": torch.arange(12.0).view(3, 4).t(),  # not as it lies in memory
        "b": torch.tensor(0.5, dtype=torch.float64),
        "c": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
    }


def flipped(tensor: Tensor, bit: int) -> Tensor:
    raw = tensor.contiguous().view(-1).view(torch.uint8).clone()
    raw[bit // 8] ^= 1 << bit % 8
    return raw.view(tensor.dtype).view(tensor.shape)


def watched(model: LlamaForCausalLM, path: Path, steps: int, **changes: int) -> tuple[dict[str, Tensor], Digests]:
    """The weights after ``steps``, under digests."""
    loop = loop_of(model)
    options = {"every": 0, "last": steps, **changes}
    hook = Digests(path, loop.parameters, **options, ended=lambda step: False)
    hook.cut(None)
    hook.begin()
    loop.hooks = [hook]
    loop.run(steps)
    hook.close()
    return values(loop), hook


def test_a_digest_is_of_the_tensors_bytes_in_their_order() -> None:
    found = digests(some())
    assert found["a"] == hashlib.sha256(some()["a"].contiguous().numpy().tobytes()).hexdigest()[:16]
    assert found["b"] == hashlib.sha256(some()["b"].numpy().tobytes()).hexdigest()[:16]
    assert list(found) == list(some())


def test_every_bit_counts() -> None:
    tensors, all_of_them = some(), {digest_of_all(some())}
    for name in ("a", "b", "c"):
        for bit in range(tensors[name].nbytes * 8):
            changed = {**tensors, name: flipped(tensors[name], bit)}
            assert unequal({"tensors": digests(tensors)}, {"tensors": digests(changed)}) == name
            all_of_them.add(digest_of_all(changed))
    assert len(all_of_them) == 1 + 8 * sum(t.nbytes for t in tensors.values())


def test_the_digest_of_all_depends_on_the_names_and_on_no_order() -> None:
    tensors = some()
    renamed = {"z" if name == "a" else name: tensor for name, tensor in tensors.items()}
    assert digest_of_all(dict(reversed(tensors.items()))) == digest_of_all(tensors)
    assert digest_of_all(renamed) != digest_of_all(tensors)
    split = {"x": torch.zeros(2), "y": torch.zeros(1)}
    assert digest_of_all(split) != digest_of_all({"x": torch.zeros(1), "y": torch.zeros(2)})


def test_a_row_for_the_start_the_first_steps_each_checkpoints_and_the_last(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    _, hook = watched(llama, tmp_path / "digests.jsonl", 27, every=12)
    rows = read(tmp_path / "digests.jsonl")
    assert [row["step"] for row in rows] == [*range(21), 24, 27]
    assert all(row["tensors"].keys() == hook.trained.keys() for row in rows)
    assert rows[0]["steps"] == 27
    name = next(iter(hook.trained))
    assert len({row["tensors"][name] for row in rows[:11]}) == 11  # then the schedule has come down to 0


def test_many_weights_are_not_hashed_at_each_of_the_first_steps(
    llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", 0)
    watched(llama, tmp_path / "digests.jsonl", 12)
    assert [row["step"] for row in read(tmp_path / "digests.jsonl")] == [0, 1, 2, 5, 10, 12]


def test_who_hashes_the_weights_changes_none_and_finds_the_same_again(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    plain = loop_of(copy.deepcopy(llama), dropout=0.1)
    plain.run(3)
    ways = []
    for name in ("one", "other"):
        loop = loop_of(copy.deepcopy(llama), dropout=0.1)
        hook = Digests(tmp_path / name, loop.parameters, every=1, last=3, ended=lambda step: False)
        loop.hooks = [hook]
        loop.run(3)
        hook.close()
        assert same(values(plain), values(loop))
        ways.append((tmp_path / name).read_bytes())
    assert ways[0] == ways[1]


@pytest.mark.cuda
def test_what_lies_on_a_gpu_has_the_digest_it_has_on_the_host() -> None:
    there = {name: tensor.cuda() if name != "b" else tensor for name, tensor in some().items()}
    assert digests(there) == digests(some())
