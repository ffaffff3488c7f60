from __future__ import annotations

import torch
from torch import nn

from lowrank.models.fingerprint import base_id, fingerprint, tensor_hash
from lowrank.models.tiny import tiny_gpt2, tiny_llama


def test_one_flipped_bit_in_any_tensor_changes_its_hash_and_no_other() -> None:
    model = tiny_gpt2()
    known = fingerprint(model)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied: the embedding's turn covers it
            continue
        last = tensor.detach().view(-1).view(torch.uint8)[-1:]
        last ^= 1
        found = fingerprint(model)
        tied = {"lm_head.weight"} if name == "transformer.wte.weight" else set()
        assert {key for key in known if known[key] != found[key]} == {name} | tied
        assert base_id(found) != base_id(known)
        last ^= 1
    assert fingerprint(model) == known


def test_type_shape_and_name_count_beside_the_bytes() -> None:
    zeros = torch.zeros(4, 6)
    hashes = {tensor_hash(zeros), tensor_hash(zeros.T), tensor_hash(zeros.view(torch.int32)), tensor_hash(zeros[:3])}
    assert len(hashes) == 4
    assert base_id({"a": "x"}) != base_id({"b": "x"})
    assert base_id({"a": "x", "b": "y"}) == base_id({"b": "y", "a": "x"})


def test_strides_do_not_count_and_scalars_have_a_hash() -> None:
    weight = torch.arange(12.0).view(3, 4)
    assert tensor_hash(weight.T) == tensor_hash(weight.T.contiguous())
    assert tensor_hash(torch.tensor(1.0)) != tensor_hash(torch.tensor(2.0))
    assert tensor_hash(torch.ones(3, dtype=torch.bfloat16)) != tensor_hash(torch.ones(3))


def test_persistent_buffers_count_and_tied_tensors_have_one_hash() -> None:
    norm = nn.BatchNorm1d(3)
    before = fingerprint(norm)
    norm.running_mean.add_(1)
    assert fingerprint(norm)["running_mean"] != before["running_mean"]
    tied = fingerprint(tiny_llama())
    assert tied["lm_head.weight"] == tied["model.embed_tokens.weight"]
    assert not any("inv_freq" in name for name in tied)  # computed, not stored: differs between machines
