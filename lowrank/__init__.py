"""lowrank: fine-tune language models with adapters you can read.

The public names, loaded when they are first used, so that ``import lowrank`` costs nothing:

    plan(model, rules) → InjectionPlan      what would be adapted, before anything changes
    apply(model, plan, seed=0)              carry it out, in place
    remove(model)                           the original modules back
    merge(model) → (model, MergeReport)     a new model without adapters, and what merging cost
    save_adapter, load_adapter              an adapter as a folder; with name= one of several on a model
    with use(model, "a")                    through that one; a list: one for each row of the batch
    with disable(model)                     the bare base
    freeze(model, "a"), unfreeze            whether one of several trains
    resize(model, r)                        LoRA of another rank, its optimizer's state carried over
    export_peft, import_peft                the same in PEFT's format
    quantize(model, "nf4")                  4-bit NormalFloat weights, in place
    train(overrides, folder) → Run          what train.py does
    open(folder) → Run                      a finished or interrupted run
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank.adapters.bank import disable, freeze, unfreeze, use
    from lowrank.adapters.inject import apply, remove
    from lowrank.adapters.merge import merge
    from lowrank.adapters.plan import InjectionPlan, plan
    from lowrank.adapters.resize import resize
    from lowrank.adapters.store import load_adapter, save_adapter
    from lowrank.export.peft import export_peft, import_peft
    from lowrank.quant.convert import quantize
    from lowrank.run import Run, open

    train: Callable[[list[str], str | Path], Run]

__version__ = "0.1.0"

HOMES = {
    "plan": "adapters.plan",
    "InjectionPlan": "adapters.plan",
    "apply": "adapters.inject",
    "remove": "adapters.inject",
    "merge": "adapters.merge",
    "save_adapter": "adapters.store",
    "load_adapter": "adapters.store",
    "use": "adapters.bank",
    "disable": "adapters.bank",
    "freeze": "adapters.bank",
    "unfreeze": "adapters.bank",
    "resize": "adapters.resize",
    "export_peft": "export.peft",
    "import_peft": "export.peft",
    "quantize": "quant.convert",
    "Run": "run",
    "open": "run",
}

__all__ = [
    "InjectionPlan",
    "Run",
    "apply",
    "disable",
    "export_peft",
    "freeze",
    "import_peft",
    "load_adapter",
    "merge",
    "open",
    "plan",
    "quantize",
    "remove",
    "resize",
    "save_adapter",
    "train",
    "unfreeze",
    "use",
]


def train_run(overrides: list[str], folder: str | Path) -> Run:
    """``lowrank.train(overrides, folder)``: what ``python train.py OVERRIDES`` does, in the run directory ``folder``.

    Raises ``lowrank.errors`` where the command would exit.
    """
    from lowrank import compose, run

    return run.train(compose.compose(list(overrides)), Path(folder))


def __getattr__(name: str) -> Any:
    if name == "train":
        return importlib.import_module("lowrank.train")  # callable
    if name not in HOMES:
        raise AttributeError(f"module 'lowrank' has no attribute '{name}'")
    return getattr(importlib.import_module(f"lowrank.{HOMES[name]}"), name)
