"""What a fused block may meet between being taken and being called: it computes the same, or runs plain."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import lowrank
from lowrank.adapters import IA3, LoRA, Prefix
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import adapted as wrapped
from lowrank.data.pack import pack
from lowrank.fast import block
from lowrank.keys import Clock, key
from lowrank.quant.convert import quantize
from lowrank.train.loss import target_loss
from tests.documents import texts
from tests.fast.passes import BLOCKS, LENGTHS, adapted, agree, blocks_run, check_fused_equals_plain, trained

BATCH = pack(texts(LENGTHS))
TIGHT = 2e-5


@pytest.mark.parametrize("targets", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj@1", "q_proj@1"])
def test_gradients_are_the_plain_ones_where_only_some_sites_have_adapters(targets: str, llama: Any) -> None:
    """Below the lowest of them nothing wants a gradient, nor is anything kept for one."""
    above = 1 if targets.endswith("@1") else BLOCKS
    check_fused_equals_plain(adapted(llama, 0.2, targets), BATCH, TIGHT, fused=above)


def lined_up(model: Any, rules: dict[str, Any]) -> Any:
    lowrank.models.attention.install(model)
    clock = Clock(0)
    apply(model, plan(model, rules), clock=clock)
    for path, parameter in named_trainable(model).items():
        parameter.data.normal_(0, 0.1, generator=key(1, path))
    clock.set(3, 0)
    return model.train()


@pytest.mark.parametrize("options", [{"freeze_a": True}, {"init": "pissa"}, {"init": "olora"}], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_are_the_plain_ones_for_every_kind_of_lora(options: Any, p: float, llama: Any) -> None:
    check_fused_equals_plain(adapted(llama, p, **options), BATCH, TIGHT)


def test_gradients_are_the_plain_ones_where_b_is_frozen(llama: Any) -> None:
    model = adapted(llama)
    for name, parameter in named_trainable(model).items():
        parameter.requires_grad_(not name.endswith(".B"))
    check_fused_equals_plain(model, BATCH, TIGHT)


def test_sites_of_one_block_may_drop_differently(llama: Any) -> None:
    rules = {
        "q_proj": partial(LoRA, r=4, dropout=0.1),
        "k_proj": partial(LoRA, r=4, dropout=0.4),
        "v_proj": partial(LoRA, r=2),
        "gate_proj": partial(LoRA, r=4, dropout=0.5),
    }
    check_fused_equals_plain(lined_up(llama.requires_grad_(False), rules), BATCH, TIGHT)


def test_a_clock_that_nobody_sets_draws_from_the_default_generator(llama: Any) -> None:
    model = adapted(llama, 0.5)
    for _, module in wrapped(model):
        module.adapter.clock = Clock(0)
    block.fuse(model)
    torch.manual_seed(1)
    first, wanted, _ = trained(model, BATCH)
    torch.manual_seed(1)
    again, found, _ = trained(model, BATCH)
    other, _, _ = trained(model, BATCH)
    assert first == again != other
    agree(found, wanted, 0.0)


def test_a_model_in_evaluation_mode_has_gradients_without_dropout(llama: Any) -> None:
    model = adapted(llama, 0.5).eval()
    check_fused_equals_plain(model, BATCH, TIGHT)


def test_disabled_adapters_take_no_part_and_get_no_gradient(llama: Any) -> None:
    model = adapted(llama)
    with torch.no_grad(), lowrank.disable(model):
        bare = target_loss(model, BATCH)
    block.fuse(model)
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    with lowrank.disable(model):
        assert blocks_run(model, BATCH) == BLOCKS
        loss, gradients, _ = trained(model, BATCH)
    torch.testing.assert_close(loss, bare)
    assert set(gradients) <= {"model.embed_tokens.weight"}
    embedding.requires_grad_(False)
    assert not torch.isclose(trained(model, BATCH)[0], bare)


def test_a_bank_runs_fused_through_the_adapter_in_use_and_plain_where_rows_choose(llama: Any) -> None:
    lowrank.models.attention.install(llama.requires_grad_(False))
    for name in ("a", "b"):
        apply(llama, plan(llama, {"all-linear": partial(LoRA, r=4)}), name=name)
    for path, parameter in named_trainable(llama).items():
        parameter.data.normal_(0, 0.1, generator=key(1, path))
    plain = {}
    for name in ("a", "b"):
        with lowrank.use(llama, name):
            plain[name] = trained(llama.train(), BATCH)
    rows = ["a", None, "b", "a"]
    with lowrank.use(llama, rows):
        mixed = trained(llama, BATCH)
    block.fuse(llama)
    for name in ("a", "b"):
        with lowrank.use(llama, name):
            assert blocks_run(llama, BATCH) == BLOCKS
            agree(trained(llama, BATCH)[1], plain[name][1], TIGHT)
    with lowrank.use(llama, rows):
        assert blocks_run(llama, BATCH) == 0
        agree(trained(llama, BATCH)[1], mixed[1], 0.0)


def test_prefixes_come_before_every_document(llama: Any) -> None:
    lowrank.models.attention.install(llama.requires_grad_(False))
    apply(llama, plan(llama, {"backbone": partial(Prefix, length=3)}))
    check_fused_equals_plain(llama.train(), BATCH, TIGHT)


def test_backward_may_be_called_twice_and_not_be_derived_again(llama: Any) -> None:
    model = adapted(llama, 0.2)
    block.fuse(model)
    parameters = list(named_trainable(model).values())
    loss = target_loss(model, BATCH)
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second[0].sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_between_steps_changes_no_gradient(mode: Any, llama: Any) -> None:
    model, ids = adapted(llama, 0.2), torch.arange(6)[None]
    block.fuse(model)
    wanted = trained(model, BATCH)[1]
    with mode():
        model.eval()
        target_loss(model, BATCH)
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        model.train()
    agree(trained(model, BATCH)[1], wanted, 0.0)


@pytest.mark.parametrize(
    "case", ["hook", "pre-hook", "backward hook", "backward pre-hook", "trains", "norm trains", "dropout"]
)
def test_what_comes_after_fusing_is_noticed_and_its_going_too(case: str, llama: Any) -> None:
    """Of one block: the other one stays fused."""
    model = adapted(llama, targets="q_proj")
    block.fuse(model)
    first = model.model.layers[0]
    layer, calls = first.mlp.gate_proj, []
    match case:
        case "hook":
            undo = layer.register_forward_hook(lambda *_: calls.append(1)).remove
        case "pre-hook":
            undo = layer.register_forward_pre_hook(lambda *_: calls.append(1)).remove
        case "backward hook":
            undo = layer.register_full_backward_hook(lambda *_: calls.append(1)).remove
        case "backward pre-hook":
            undo = layer.register_full_backward_pre_hook(lambda *_: calls.append(1)).remove
        case "trains":
            layer.weight.requires_grad_(True)
            undo = partial(layer.weight.requires_grad_, False)
        case "norm trains":
            first.input_layernorm.weight.requires_grad_(True)
            undo = partial(first.input_layernorm.weight.requires_grad_, False)
        case "dropout":
            first.mlp.act_fn = nn.Sequential(first.mlp.act_fn, nn.Dropout(0.1))
            undo = partial(setattr, first.mlp, "act_fn", first.mlp.act_fn[0])
    assert blocks_run(model, BATCH) == BLOCKS - 1
    target_loss(model, BATCH).backward()
    if "hook" in case:
        assert calls
    if case == "trains":
        assert layer.weight.grad is not None
    undo()
    assert blocks_run(model, BATCH) == BLOCKS


def test_a_hook_on_every_module_sees_every_call(llama: Any) -> None:
    model = adapted(llama)
    block.fuse(model)
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        target_loss(model, BATCH)
    finally:
        handle.remove()
    inside = {module for layer in model.model.layers for module in layer.modules()}
    assert inside <= set(seen)


def test_an_adapter_put_on_after_fusing_takes_part(llama: Any) -> None:
    model = adapted(llama, targets="q_proj")
    block.fuse(model)
    lowrank.remove(model)
    model = adapted(model, targets="v_proj")
    assert blocks_run(model, BATCH) == BLOCKS
    _, found, _ = trained(model, BATCH)
    block.unfuse(model)
    agree(found, trained(model, BATCH)[1], TIGHT)
    apply(lowrank.remove(model), plan(model, {"gate_proj@0": IA3}))
    block.fuse(model)
    assert blocks_run(model, BATCH) == BLOCKS - 1


def test_a_layer_with_a_compute_dtype_of_its_own_stays_plain_and_is_named(llama: Any) -> None:
    model = adapted(quantize(llama, compute_dtype=torch.bfloat16))
    assert block.fuse(model) == f"0/{BLOCKS} blocks ({BLOCKS} plain: q_proj: it has a compute_dtype of its own)"


def test_the_residual_stays_in_its_dtype_under_autocast(llama: Any) -> None:
    model = adapted(llama)
    block.fuse(model)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert blocks_run(model, BATCH) == BLOCKS
    assert seen == [torch.float32] * BLOCKS
