"""Packing: a document in a pack is what it is alone, and every target is counted once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from documents import Text, texts
from torch import Tensor, nn

from lowrank.data.pack import Batch, pack, pad
from lowrank.models import attention
from lowrank.train.loss import target_loss

LENGTHS = [5, 1, 9, 2, 7]


@pytest.fixture(params=["llama64", "gpt2_64"])
def packed(request: pytest.FixtureRequest) -> Any:
    """Either architecture in fp64 with attention that keeps documents apart."""
    model = request.getfixturevalue(request.param)
    assert attention.install(model) is None
    return model


def edges(documents: Sequence[Text]) -> list[tuple[int, int]]:
    ends = torch.tensor([0, *(len(d.tokens) for d in documents)]).cumsum(0).tolist()
    return list(itertools.pairwise(ends))


def alone(model: nn.Module, document: Text) -> Tensor:
    """(length, vocabulary) logits of one document on the model's ordinary path."""
    logits: Tensor = model(input_ids=torch.tensor([document.tokens]), use_cache=False).logits[0]
    return logits


def plain_loss(model: nn.Module, documents: Sequence[Text]) -> Tensor:
    """The sum over documents, each alone, of −log p of its marked tokens but the first."""
    losses = []
    for document in documents:
        logits = alone(model, document)[:-1]
        learnt = torch.tensor(document.target[1:], dtype=torch.bool)
        wanted = torch.tensor(document.tokens[1:], dtype=torch.int64)
        losses.append(F.cross_entropy(logits[learnt], wanted[learnt], reduction="sum"))
    return torch.stack(losses).sum()


def checkpoint_layers(model: Any) -> None:
    """Recomputes every layer in backward: only done in training mode, so a model's own dropout is switched off."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.eval()
        elif hasattr(module, "attn_dropout"):
            module.training = False
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    options = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
    getattr(model, f"{name}_checkpointing_enable")(**options)


def test_a_pack_holds_the_documents_end_to_end_with_positions_that_restart() -> None:
    documents = texts(LENGTHS)
    batch = pack(documents)
    ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
    assert ids.shape == positions.shape == (1, sum(LENGTHS))
    assert batch.inputs["cu_seqlens"].tolist() == [0, 5, 6, 15, 17, 24]
    for document, (a, b) in zip(documents, edges(documents), strict=True):
        assert tuple(ids[0, a:b].tolist()) == document.tokens
        assert positions[0, a:b].tolist() == list(range(b - a))
    assert batch.rows == tuple(d.row for d in documents)


@pytest.mark.parametrize("collate", [pack, pad])
def test_targets_are_the_marked_tokens_but_a_documents_first(collate: Any) -> None:
    documents = texts(LENGTHS)
    batch: Batch = collate(documents)
    flat = batch.inputs["input_ids"].flatten()
    wanted = [d.tokens[i] for d in documents for i in range(1, len(d.tokens)) if d.target[i]]
    assert batch.targets.tolist() == wanted == flat[batch.positions + 1].tolist()
    assert batch.positions.unique().numel() == len(batch.positions)
    firsts = [a for a, _ in edges(documents)] if collate is pack else [row * 9 for row in range(5)]
    assert not {first - 1 for first in firsts} & set(batch.positions.tolist())


def test_a_document_whose_only_target_is_its_first_token_has_none() -> None:
    for collate in (pack, pad):
        batch = collate([Text(1, (3, 4), (True, False))])
        assert batch.positions.shape == batch.targets.shape == (0,)
        assert batch.targets.dtype == torch.int64


def test_padding_never_counts_as_a_real_token() -> None:
    documents = texts(LENGTHS)
    assert pack(documents).real_tokens == pad(documents).real_tokens == sum(LENGTHS)
    assert pack(documents).inputs["input_ids"].numel() == sum(LENGTHS)


def test_padded_rows_are_masked_on_the_right() -> None:
    documents = texts([2, 4])
    batch = pad(documents)
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.inputs["input_ids"][0].tolist() == [*documents[0].tokens, 0, 0]


def test_a_batch_moves_whole_but_for_the_boundaries_which_every_layer_reads_on_the_host() -> None:
    moved = pack(texts(LENGTHS)).to("meta")
    edges = moved.inputs.pop("cu_seqlens")
    assert all(t.is_meta for t in (*moved.inputs.values(), moved.positions, moved.targets))
    assert edges.tolist() == [0, 5, 6, 15, 17, 24]
    assert (moved.real_tokens, moved.rows) == (24, (100, 101, 102, 103, 104))


@pytest.mark.cuda
@pytest.mark.parametrize("collate", [pack, pad])
def test_a_pinned_batch_is_the_same_batch(collate: Any) -> None:
    batch: Batch = collate(texts(LENGTHS))
    pinned = batch.pinned()
    for name, tensor in {"positions": batch.positions, "targets": batch.targets, **batch.inputs}.items():
        found = {"positions": pinned.positions, "targets": pinned.targets, **pinned.inputs}[name]
        assert torch.equal(found, tensor)
        assert found.is_pinned() or name == "cu_seqlens"


def test_packed_logits_are_the_separate_ones(packed: Any) -> None:
    documents = texts(LENGTHS)
    together = packed(**pack(documents).inputs, use_cache=False).logits[0]
    for document, (a, b) in zip(documents, edges(documents), strict=True):
        torch.testing.assert_close(together[a:b], alone(packed, document), rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_documents_loss_has_exactly_zero_gradient_to_every_other_document(packed: Any, checkpointing: bool) -> None:
    documents = texts(LENGTHS)
    batch = pack(documents)
    if checkpointing:
        checkpoint_layers(packed)
    inputs = dict(batch.inputs)
    embedded = packed.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()  # (1, tokens, hidden)
    logits = packed(inputs_embeds=embedded, **inputs, use_cache=False).logits[0]
    for a, b in edges(documents):
        [grad] = torch.autograd.grad(logits[a:b].square().sum(), [embedded], retain_graph=True)
        reached = grad[0].abs().amax(1) > 0  # (tokens,)
        assert reached.tolist() == [a <= token < b for token in range(24)]


@pytest.mark.parametrize("collate", [pack, pad])
def test_the_batchs_loss_and_gradients_are_those_of_its_documents_alone(packed: Any, collate: Any) -> None:
    documents = texts(LENGTHS)
    wanted = plain_loss(packed, documents)
    found = target_loss(packed, collate(documents))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    names, parameters = zip(*packed.named_parameters(), strict=True)
    expected, actual = torch.autograd.grad(wanted, parameters), torch.autograd.grad(found, parameters)
    for name, one, other in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * max(1.0, float(other.abs().max())), msg=name)


def test_one_document_alone_in_a_pack_is_itself(packed: Any) -> None:
    [document] = texts([12])
    logits = packed(**pack([document]).inputs, use_cache=False).logits[0]
    torch.testing.assert_close(logits, alone(packed, document), rtol=0, atol=1e-9)


def test_the_order_of_documents_does_not_change_a_packs_loss(packed: Any) -> None:
    documents = texts(LENGTHS)
    with torch.no_grad():
        one, other = (target_loss(packed, pack(order)) for order in (documents, documents[::-1]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
