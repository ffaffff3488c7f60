"""What PEFT gets wrong and lowrank does not, measured side by side on one small model: `python benchmarks/peers.py`.

Each function below is one fault and returns (PEFT's figure, ours), in the unit that its docstring names. The table
of docs/peers.md is what this prints; tests/benchmarks/test_peers.py holds ours to 0 or 1.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowrank
from lowrank.adapters import AdaLoRA, LoRA
from lowrank.adapters.combine import combine
from lowrank.adapters.inject import hooks, named_trainable
from lowrank.errors import ConfigError
from lowrank.keys import key
from lowrank.testing.bases import VOCABULARY, build_llama

TOKENS = torch.randint(0, VOCABULARY, (4, 24), generator=key(0, "tokens"))
Figures = tuple[float, float]


def p1() -> Figures:
    """P1: misspelt targets accepted in silence beside one that matches (of 1)."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(build_llama(), LoraConfig(target_modules=["q_proj", "v_porj"]))
    try:
        lowrank.plan(build_llama(), {"q_proj": LoRA, "v_porj": LoRA})
    except ConfigError:
        return 1, 0
    return 1, 1


def p2() -> Figures:
    """P2: share of q_proj's starting A that changes when v_proj is adapted too, same seed."""
    from peft import LoraConfig, get_peft_model

    def theirs(targets: list[str]) -> Tensor:
        torch.manual_seed(0)
        model = get_peft_model(build_llama(), LoraConfig(target_modules=targets))
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "q_proj.lora_A" in n])

    def ours(targets: list[str]) -> Tensor:
        model = build_llama()
        lowrank.apply(model, lowrank.plan(model, dict.fromkeys(targets, LoRA)), seed=0)
        return torch.cat([p.flatten() for n, p in named_trainable(model).items() if "q_proj.adapter.A" in n])

    return changed(theirs(["q_proj"]), theirs(["q_proj", "v_proj"])), changed(
        ours(["q_proj"]), ours(["q_proj", "v_proj"])
    )


def p5() -> Figures:
    """P5: share of a small adapter's effect that is lost by merging it into NF4 (1: all of it)."""
    from peft import LoraConfig, get_peft_model

    wide = partial(build_llama, hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        base = four_bit(wide())
        before = base(TOKENS).logits
        theirs = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=key(0, name)))
        wrapped = theirs(TOKENS).logits
        merged = theirs.merge_and_unload()(TOKENS).logits
        peft = float((merged - wrapped).norm() / (wrapped - before).norm())
    model = tuned(lowrank.quantize(wide()), size=0.02)
    calibration = torch.randint(0, VOCABULARY, (16, 24), generator=key(1, "calibration"))
    _, report = lowrank.merge(model, to="nf4", min_share=None, probe=TOKENS, calibration=calibration)
    assert report.share is not None
    return peft, 1 - report.share


def four_bit(model: Any) -> Any:
    """The model with its linear layers but the head as bitsandbytes' own NF4 layers."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and path != "lm_head":
            new = Linear4bit(
                layer.in_features, layer.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
            )
            new.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(path, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def p6() -> Figures:
    """P6: share of a bf16 base's weights that merging, and taking it back, changes."""
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(build_llama().bfloat16(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    layers = [m for n, m in theirs.named_modules() if n.endswith("base_layer")]
    before = [layer.weight.clone() for layer in layers]
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    peft = changed(flat(before), flat([layer.weight for layer in layers]))
    model = tuned(build_llama().bfloat16(), size=0.5)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    lowrank.merge(model, min_share=None)
    ours = changed(flat(weights.values()), flat(p for _, p in model.named_parameters()))
    return peft, ours


def p7(method: str) -> Figures:
    """P7: relative error of the weighted sum 0.3 ΔW₁ + 0.7 ΔW₂."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [tuned(build_llama(), size=1.0, seed=seed) for seed in (1, 2)]
        folders = [lowrank.save_adapter(m, folder / f"ours{i}") for i, m in enumerate(models)]
        for i, m in enumerate(models):
            lowrank.export_peft(m, folder / f"peft{i}")
        theirs = PeftModel.from_pretrained(build_llama(), folder / "peft0", adapter_name="0")
        theirs.load_adapter(folder / "peft1", adapter_name="1")
        theirs.add_weighted_adapter(["0", "1"], [0.3, 0.7], "sum", combination_type=method)
        combine(folders, [0.3, 0.7], folder / "sum")
        wanted = [0.3 * a + 0.7 * b for a, b in zip(*map(deltas, models), strict=True)]
        ours = deltas(lowrank.load_adapter(build_llama(), folder / "sum"))
        peft = [m.get_delta_weight("sum") for m in theirs.modules() if hasattr(m, "get_delta_weight")]
    return error(flat(peft), flat(wanted)), error(flat(ours), flat(wanted))


def p8() -> Figures:
    """P8: relative error of the logits of a PiSSA adapter that was saved and loaded (PEFT: pissa_niter_4)."""
    from peft import LoraConfig, PeftModel, get_peft_model

    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        settings = LoraConfig(target_modules="all-linear", r=4, init_lora_weights="pissa_niter_4")
        theirs = get_peft_model(build_llama(), settings)
        move(p for n, p in theirs.named_parameters() if "lora_" in n)
        theirs.save_pretrained(folder / "peft")
        ours = tuned(build_llama(), size=0.02, init="pissa")
        lowrank.save_adapter(ours, folder / "ours")
        again = PeftModel.from_pretrained(build_llama(), folder / "peft")
        peft = error(again(TOKENS).logits, theirs(TOKENS).logits)
        return peft, error(lowrank.load_adapter(build_llama(), folder / "ours")(TOKENS).logits, ours(TOKENS).logits)


def p9() -> Figures:
    """P9: AdaLoRA's average rank over its target's after a run whose loop says nothing of ranks."""
    from peft import AdaLoraConfig, get_peft_model

    steps, start, target = 12, 6, 2
    settings = AdaLoraConfig(
        init_r=start, target_r=target, tinit=1, tfinal=3, deltaT=1, total_step=steps, target_modules="all-linear"
    )
    theirs = get_peft_model(build_llama(), settings)
    descend(theirs, [p for p in theirs.parameters() if p.requires_grad], steps, [])
    peft = [p.count_nonzero().item() for n, p in theirs.named_parameters() if "lora_E" in n]
    model = build_llama()
    lowrank.apply(model, lowrank.plan(model, {"all-linear": partial(AdaLoRA, init_r=start, target_r=target)}))
    descend(model, list(named_trainable(model).values()), steps, hooks(model, steps))
    ours = [p.count_nonzero().item() for n, p in named_trainable(model).items() if n.endswith(".E")]
    return sum(peft) / len(peft) / target, sum(ours) / len(ours) / target


def p10() -> Figures:
    """P10: parameters of a frozen adapter that train after it has been disabled for a moment (share)."""
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(build_llama(), LoraConfig(target_modules="all-linear")).requires_grad_(False)
    own = [p for n, p in theirs.named_parameters() if "lora_" in n]
    with theirs.disable_adapter():
        pass
    model = tuned(build_llama(), size=1.0).requires_grad_(False)
    with lowrank.disable(model):
        pass
    ours = [p for n, p in model.named_parameters() if ".adapter." in n]
    return sum(p.requires_grad for p in own) / len(own), sum(p.requires_grad for p in ours) / len(ours)


def p11() -> Figures:
    """P11: share of the embeddings' entries that merging an adapter of the tied head changes."""
    from peft import LoraConfig, get_peft_model

    tied = partial(build_llama, tie_word_embeddings=True)
    before = tied().get_input_embeddings().weight.clone()
    theirs = get_peft_model(tied(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    peft = changed(before, theirs.merge_and_unload().get_input_embeddings().weight)
    merged, _ = lowrank.merge(tuned(tied(), size=0.5, targets="lm_head"))
    return peft, changed(before, merged.get_input_embeddings().weight)


FAULTS: dict[str, Callable[[], Figures]] = {
    "P1": p1,
    "P2": p2,
    "P5": p5,
    "P6": p6,
    "P7 linear": partial(p7, "linear"),
    "P7 svd": partial(p7, "svd"),
    "P8": p8,
    "P9": p9,
    "P10": p10,
    "P11": p11,
}


def tuned(model: Any, *, size: float, targets: str = "all-linear", seed: int = 0, **options: Any) -> Any:
    """``model`` with a LoRA whose values have been moved from where they start."""
    lowrank.apply(model, lowrank.plan(model, {targets: partial(LoRA, r=4, **options)}), seed=seed)
    move(named_trainable(model).values(), size, seed)
    return model.eval()


@torch.no_grad()
def move(parameters: Any, size: float = 0.02, seed: int = 0) -> None:
    generator = key(seed, "move")
    for parameter in parameters:
        parameter += size * torch.randn(parameter.shape, generator=generator)


def descend(model: Any, parameters: list[Any], steps: int, watching: list[Any]) -> None:
    """A plain loop; ``watching`` are the hooks that lowrank's own loop calls."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        for hook in watching:
            hook.before_update(step)
        optimizer.step()
        for hook in watching:
            hook.after_update(step)


@torch.no_grad()
def deltas(model: Any) -> list[Tensor]:
    pairs = [module.factors() for module in model.modules() if isinstance(module, LoRA)]
    return [B @ A for A, B in pairs]


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])


def changed(before: Tensor, after: Tensor) -> float:
    return float((before != after).float().mean())


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("| fault | PEFT | lowrank |\n|---|---|---|")
    for name, measure in FAULTS.items():
        what = (measure.func if isinstance(measure, partial) else measure).__doc__ or ""
        theirs, ours = measure()
        print(f"| {name}{what.partition(':')[2].strip().rstrip('.').join([': ', ''])} | {theirs:.3g} | {ours:.3g} |")
