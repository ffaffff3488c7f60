"""Recomputation: the gradients of a model without it, to the bit; what it keeps and repeats, to the byte and FLOP."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli import SMALL, train
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank
from lowrank import fast
from lowrank.adapters import AdaLoRA, Bottleneck, DoRA, LoRA, Prefix, Prompt
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import plan
from lowrank.adapters.sites import blocks, sites
from lowrank.compose import compose
from lowrank.data.pack import Batch, pack, pad
from lowrank.errors import ConfigError
from lowrank.fast import linear
from lowrank.fast.recompute import MODES, recompute, widths
from lowrank.keys import Clock, key
from lowrank.models import attention
from lowrank.quant.convert import quantize
from lowrank.testing.bases import VOCABULARY, build_gpt2, build_llama
from lowrank.train.loss import target_loss
from tests.documents import texts

LENGTHS = (7, 12, 3, 9)
LORA = partial(LoRA, r=4, dropout=0.2)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"all-linear": LORA},
    "dora": {"all-linear": partial(DoRA, r=4, dropout=0.2)},
    "adalora": {"all-linear": partial(AdaLoRA, init_r=4, target_r=2, dropout=0.2)},
    "bottleneck": {"blocks": Bottleneck, "q_proj": LORA},
    "prefix": {"backbone": partial(Prefix, hidden=8)},
    "prompt": {"backbone": Prompt},
}
DROPLESS = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def adapted(model: Any, rules: dict[str, Any], *, fused: bool = True) -> Any:
    """The model with packed attention and adapters away from their start, in training mode at a fixed time."""
    assert attention.install(model.requires_grad_(False)) is None
    clock = Clock(0)
    apply(model, plan(model, rules), clock=clock)
    for path, parameter in named_trainable(model).items():
        parameter.data.normal_(0, 0.1, generator=key(1, path))
    clock.set(3, 0)
    if fused:
        fast.fuse(model)
    return model.train()


def gradients(model: Any, batch: Batch, context: AbstractContextManager[Any] | None = None) -> dict[str, Tensor]:
    """Of one pass whose own dropout, where the model has any, starts from one seed."""
    torch.manual_seed(5)
    model.zero_grad()
    with context or nullcontext():
        loss = target_loss(model, batch)
    loss.backward()
    return {name: p.grad.clone() for name, p in named_trainable(model).items()}


def kept(model: Any, batch: Batch) -> int:
    """Bytes kept between forward and backward that are no parameter's."""
    found: dict[int, Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        target_loss(model, batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name, gradient in wanted.items() if not torch.equal(found[name], gradient)]


def changed(model: Any, batch: Batch, context: Any = nullcontext) -> dict[str, list[str]]:
    """The gradients that a mode changes, by mode, ``off`` after the others among them."""
    wanted = gradients(model, batch, context())
    found = {}
    for mode in (*MODES[1:], "off"):
        recompute(model, mode)
        if names := differing(gradients(model, batch, context()), wanted):
            found[mode] = names
    return found


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_stay_to_the_bit_packed_and_padded(method: str, fused: bool, llama: Any) -> None:
    model = adapted(llama, METHODS[method], fused=fused)
    for collate in (pack, pad):
        assert changed(model, collate(texts(LENGTHS))) == {}


@pytest.mark.parametrize("case", ["its own dropout", "fused"])
def test_gpt2s_gradients_stay_to_the_bit(case: str) -> None:
    model = adapted(build_gpt2(**({} if case == "its own dropout" else DROPLESS)), METHODS["lora"])
    for collate in (pack, pad):
        assert changed(model, collate(texts(LENGTHS))) == {}


@pytest.mark.parametrize("case", ["nf4", "bf16", "onednn", "MKL", "embeddings train"])
def test_gradients_stay_to_the_bit_whatever_computes(case: str, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    context: Any = nullcontext
    match case:
        case "nf4":
            llama = quantize(llama)
        case "bf16":
            context = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
        case "onednn" | "MKL":
            monkeypatch.setattr(linear, "cannot", lambda: None if case == "onednn" else "asked for")
    rules = {"all-linear": LORA, **({"embedding": partial(LoRA, r=2)} if case == "embeddings train" else {})}
    assert changed(adapted(llama, rules), pack(texts(LENGTHS)), context) == {}


def test_a_mask_that_no_clock_times_is_drawn_again_from_torchs_generator(llama: Any) -> None:
    model = adapted(llama, METHODS["lora"])
    for module in model.modules():
        if hasattr(module, "clock"):
            module.clock = Clock()
    assert changed(model, pack(texts(LENGTHS))) == {}
    torch.manual_seed(6)
    assert differing(
        gradients(model, pack(texts(LENGTHS))), gradients(adapted(build_llama(), METHODS["lora"]), pack(texts(LENGTHS)))
    )


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 4 · 16 queries, not 32
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def built(name: str, depth: int) -> Any:
    if name == "GPT2LMHeadModel":
        return build_gpt2(n_layer=depth, **DROPLESS)
    cls = getattr(transformers, name)
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim" or name not in ("Qwen2ForCausalLM", "Phi3ForCausalLM")}
    torch.manual_seed(0)
    return cls(cls.config_class(**sizes, num_hidden_layers=depth))


FUSED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*(f"{name}ForCausalLM" for name in FUSED), "GPT2LMHeadModel"])
def test_a_fused_block_keeps_and_repeats_what_the_formulas_say(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "cannot", lambda: "FLOPs are counted of torch's own products")
    batch, tokens = pack(texts(LENGTHS)), sum(LENGTHS)
    down = "*.mlp.c_proj" if "GPT2" in name else "down_proj"  # the adapter of what no mode repeats
    memory, work = [], []
    for depth in (2, 4):
        model = adapted(built(name, depth), {down: partial(LoRA, r=4)})
        width = widths(dict(sites(model))[blocks(model)[0]])
        counts = []
        for each in ("off", mode):
            recompute(model, each)
            with FlopCounterMode(display=False) as counter:
                gradients(model, batch)
            counts.append(counter.get_total_flops())
        memory.append(kept(model, batch))
        work.append(counts[1] - counts[0])
    assert memory[1] - memory[0] == 2 * tokens * width.kept(mode)
    assert work[1] - work[0] == 2 * tokens * width.flops(mode, length=0)  # attention's are not counted on a CPU
    assert width.kept("block") == 4 * width.d
    assert width.kept("off") - width.kept("selective") == 4 * width.u


def test_the_formulas_of_half_precision(llama: Any) -> None:
    """8d + 4kv + 4f + 4 heads + 8 in bf16."""
    width = widths(llama.model.layers[0])
    d, kv, f, heads = width.d, width.kv, width.u // 2, width.heads
    assert width.kept("off", 2, 2) == 8 * d + 4 * kv + 4 * f + 4 * heads + 8
    assert width.kept("block", 2, 2) == 2 * d
    assert width.again("block", 2, 2) == width.kept("off", 2, 2) - 2 * d


@pytest.mark.parametrize("collate", [pack, pad])
def test_a_plain_block_keeps_its_input_alone(collate: Any) -> None:
    batch = collate(texts(LENGTHS))
    rows = batch.inputs["input_ids"].numel()
    memory = []
    for depth in (2, 4):
        model = adapted(build_gpt2(n_layer=depth), METHODS["lora"], fused=False)
        recompute(model, "block")
        memory.append(kept(model, batch))
    assert memory[1] - memory[0] == 2 * rows * model.config.n_embd * 4


def test_the_line_at_the_start_says_what_is_done_again(llama: Any, gpt2: Any) -> None:
    model = adapted(llama, METHODS["lora"])
    assert recompute(model, "off") == ""
    assert recompute(model, "block") == "recomputation: 2/2 blocks whole"
    assert recompute(model, "selective") == "recomputation: 2/2 blocks' first products of the feed-forward"
    for plain in (adapted(gpt2, METHODS["lora"]), quantize(build_llama().requires_grad_(False))):
        assert recompute(plain, "selective") == "recomputation: 2/2 plain blocks' feed-forwards"
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    )
    model = adapted(opt, METHODS["lora"])
    assert recompute(model, "selective") == "recomputation: 3/3 blocks whole"  # its feed-forward is no part of its own
    assert changed(model, pad(texts(LENGTHS))) == {}
    with pytest.raises(ConfigError, match="Linear has no list of blocks; off"):
        recompute(nn.Linear(2, 2), "block")


def test_off_leaves_nothing_behind_and_generation_is_the_plain_models(llama: Any, tokens: Tensor) -> None:
    model = adapted(llama, METHODS["lora"]).eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    wanted = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for mode in MODES[1:]:
        recompute(model, mode)
        recompute(model, mode)  # twice is once
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0), wanted)
    recompute(model, "off")
    assert {name: vars(module) for name, module in model.named_modules()} == before


@pytest.mark.usefixtures("cache")
def test_a_run_ends_in_the_same_bits_in_every_mode(rows: Path, tmp_path: Path) -> None:
    small = (f"data.path={rows}", *SMALL, "model=tiny_llama", "loop.steps=3", "adapter.dropout=0.1")
    quick = ("eval.before=false", "eval.generate.limit=0", "checkpoint.every=0")
    for way in ("true", "false"):
        ends = set()
        for mode in MODES:
            more = [f"loop.gradient_checkpointing={mode}", f"loop.fast={way}"]
            run = lowrank.train([*small, *quick, *more], tmp_path / f"{mode} {way}")
            ends.add((run.folder / "adapter" / "adapter.safetensors").read_bytes())
            assert ("; recomputation: 2/2 " in run.summary["fast"]) == (mode != "off")
        assert len(ends) == 1


@pytest.mark.usefixtures("cache")
def test_train_py_reads_a_bare_off_and_the_older_true_and_false(rows: Path, tmp_path: Path) -> None:
    small = (f"data.path={rows}", *SMALL, "model=tiny_llama", "loop.steps=1", "eval.before=false")
    done = train(*small, "loop.gradient_checkpointing=off", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert lowrank.open(tmp_path / "run").config.loop.gradient_checkpointing == "off"
    for given, read in {"false": "off", "true": "block", "block": "block", "selective": "selective"}.items():
        assert compose([f"loop.gradient_checkpointing={given}"]).loop.gradient_checkpointing == read
