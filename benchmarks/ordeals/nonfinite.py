"""NaN and infinity planted in a run: it must stop with 5, and nothing that is not finite may be on the disk."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ordeals import forks
from benchmarks.ordeals.arm import Arm, Row, spaced
from benchmarks.ordeals.ground import Ground
from lowrank.session import session

ACCUMULATE = 2
NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Plant:
    """What is not finite, and when: at a step and a micro-batch of it, both from 1. Step 0: before the first."""

    what: str  # a name of PLANTS
    value: float
    step: int
    micro_batch: int = 1
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.value} in {self.what}, step {self.step}, micro-batch {self.micro_batch}, {self.precision}"

    @property
    def call(self) -> int:
        """The forward of the run, from 1, at which it comes."""
        return (self.step - 1) * ACCUMULATE + self.micro_batch


def forty() -> list[Plant]:
    """Of everything that a step computes, at its beginning, in its course and at its end, in every precision."""
    whens = [(1, 1), (4, 2), (8, 1)]
    found = [Plant(what, NAN, *when) for what in ("loss", "gradient", "hidden") for when in whens]
    found += [Plant(what, value, 3, 2) for what in ("loss", "gradient", "hidden") for value in (INF, -INF)]
    found += [Plant(w, v, 5, 1, p) for w in ("loss", "hidden") for v in (NAN, INF) for p in ("bf16", "fp16")]
    found += [Plant("every gradient", NAN, 2), Plant("every gradient", INF, 7), Plant("gradient", NAN, 6, 2, "bf16")]
    found += [Plant("one value of a gradient", v, s) for v, s in ((NAN, 2), (INF, 6))]
    found += [Plant("penalty", value, step) for value, step in ((NAN, 1), (INF, 5))]
    found += [Plant("weight", value, step) for value, step in ((NAN, 1), (INF, 4), (NAN, 8))]
    found += [Plant("base", value, 0) for value in (NAN, INF)]
    found += [Plant("huge loss", 1e36, 3), Plant("huge update", 1e38, 1), Plant("optimizer", NAN, 3)]
    found += [Plant("start", NAN, 0), Plant("penalty's gradient", NAN, 2)]
    return found


def rows(ground: Ground, most: int | None = None) -> Iterator[Row]:
    plants = spaced(forty(), most)
    found = []
    for arm in ground.arms:
        refuse_unsound(ground, arm)
        chosen = [plant for plant in plants if arm.name == "lowrank" or applies(plant)]
        found.append(ground.judged(chosen, partial(judge, ground, arm)))
    yield Row("NaN or infinity planted: exit code 5, nothing that is not finite is saved", *found)


def refuse_unsound(ground: Ground, arm: Arm) -> None:
    """The same run with nothing planted ends well: without that no exit code would mean anything."""
    folder = ground.place(f"{arm.name[:4]} nothing planted")
    forks.control(
        made(ground, arm, Plant("nothing", NAN, 0), folder), f"{arm.name}: nothing is planted, and yet it fails"
    )


def applies(plant: Plant) -> bool:
    """The Trainer has no penalty, and its fp16 needs a GPU."""
    return not plant.what.startswith("penalty") and plant.precision != "fp16"


def judge(ground: Ground, arm: Arm, plant: Plant) -> str:
    folder = ground.place(f"{arm.name[:4]} {plant}")
    ended = forks.child(made(ground, arm, plant, folder))
    saved = forks.value(lambda: not_finite(folder))
    fault = f"saved all the same: {', '.join(saved[:3])}" if saved else ""
    if ended.code == 0:
        fault = f"exit code 0; {fault}"
    if arm.name == "lowrank":
        if ended.code != 5 or "Traceback" in ended.output:
            fault = f"exit code {ended.code}: {ended.last}; {fault}"
        if (folder / "adapter").exists():
            fault += "; there is an adapter/"
    shutil.rmtree(folder, ignore_errors=True)
    return fault


def not_finite(folder: Path) -> list[str]:
    """Every tensor below a folder that has a value that is not finite."""
    from safetensors.torch import load_file

    found = []
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("optimizer.pt")]):
        tensors = load_file(path) if path.suffix == ".safetensors" else moments(torch.load(path, weights_only=True))
        bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
        found += [f"{path.relative_to(folder)}: {name}" for name in bad]
    return found


def moments(state: dict[str, Any]) -> dict[str, Tensor]:
    states = state["state"].items()
    return {f"{i}.{name}": v for i, held in states for name, v in held.items() if isinstance(v, Tensor)}


def made(ground: Ground, arm: Arm, plant: Plant, folder: Path) -> Callable[[], None]:
    return ours(ground, plant, folder) if arm.name == "lowrank" else theirs(ground, plant, folder)


def ours(ground: Ground, plant: Plant, folder: Path) -> Callable[[], None]:
    run = ground.ours.having(
        f"loop.accumulate={ACCUMULATE}", "loop.micro_batch=1", f"loop.precision={plant.precision}", "model.dtype=fp32"
    )
    if plant.what == "huge update":
        run = run.having("optim.lr=1e38", "loop.max_grad_norm=.inf", "optim=sgd")
    if plant.what == "base":
        run = run.having("model=hf", f"model.name={broken_base(ground, plant, folder)}")

    def act() -> None:
        make_loop, calls = session.Session.make_loop, itertools.count(1)

        def with_plant(self: session.Session, clock: Any) -> Any:
            loop = make_loop(self, clock)
            real = loop.loss
            loop.loss = lambda model, batch: planted(plant, model, lambda: real(model, batch), next(calls))
            return loop

        session.Session.make_loop = with_plant  # type: ignore[method-assign]
        if plant.what.startswith("penalty"):
            session.Session.penalty = lambda self: penalty(self.loop, plant)  # type: ignore[method-assign, assignment]
        run.program(folder)

    return act


def theirs(ground: Ground, plant: Plant, folder: Path) -> Callable[[], None]:
    peer = ground.peer.with_(
        gradient_accumulation_steps=ACCUMULATE, per_device_train_batch_size=1, bf16=plant.precision == "bf16"
    )
    if plant.what == "huge update":
        peer = peer.with_(learning_rate=1e38, max_grad_norm=0.0, optim="sgd")
    if plant.what == "base":
        peer = peer.of(broken_base(ground, plant, folder))

    def prepare(trainer: Any) -> None:
        real, calls = trainer.compute_loss, itertools.count(1)

        def compute_loss(model: nn.Module, inputs: Any, **more: Any) -> Tensor:
            return planted(plant, model, lambda: real(model, inputs, **more), next(calls))

        trainer.compute_loss = compute_loss

    return lambda: peer.preparing(prepare).program(folder)


def planted(plant: Plant, model: nn.Module, loss: Callable[[], Tensor], call: int) -> Tensor:
    """The loss of a forward; at the plant's own, with what is planted in it."""
    if plant.what == "start" and call == 1:
        poison(trained(model)[0], plant.value)
    if call != plant.call:
        return loss()
    match plant.what:
        case "loss" | "huge loss":
            return loss() * plant.value * (1.0 if plant.what == "loss" else 1e36)
        case "gradient" | "every gradient" | "one value of a gradient":
            return with_gradients(plant, model, loss)
        case "hidden":
            return with_output(model, loss, plant.value)
        case "weight":
            poison(trained(model)[0], plant.value)
        case "optimizer":
            poison_moments(model, plant.value)
    return loss()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def poison(tensor: Tensor, value: float) -> None:
    tensor.view(-1)[0] = value


def with_gradients(plant: Plant, model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """The planted gradient goes once: what comes afterwards for these parameters is as it is."""

    def spoilt(gradient: Tensor) -> Tensor:
        spoilt_one = gradient.clone()
        spoilt_one.view(-1)[: 1 if plant.what.startswith("one") else None] = plant.value
        return spoilt_one

    chosen = trained(model) if plant.what.startswith("every") else trained(model)[:1]
    for parameter in chosen:
        parameter.register_hook(spoilt)
    return loss()


def with_output(model: nn.Module, loss: Callable[[], Tensor], value: float) -> Tensor:
    layer = next(module for name, module in model.named_modules() if name.endswith("mlp.down_proj"))
    handle = layer.register_forward_hook(lambda module, inputs, output: output * value)
    try:
        return loss()
    finally:
        handle.remove()


def poison_moments(model: nn.Module, value: float) -> None:
    import gc

    for held in gc.get_objects():
        if isinstance(held, torch.optim.Optimizer):
            for state in held.state.values():
                for tensor in state.values():
                    if isinstance(tensor, Tensor) and tensor.dim():
                        poison(tensor, value)


def penalty(loop: Any, plant: Plant) -> Tensor | float:
    if loop.state.step + 1 != plant.step:
        return 0.0
    weight = trained(loop.model)[0].sum()
    if plant.what == "penalty":
        return weight * plant.value
    return torch.where(weight != weight, weight, torch.sqrt(weight * 0))  # finite, and its gradient is not


def broken_base(ground: Ground, plant: Plant, folder: Path) -> Path:
    """The tiny model with a weight of its file that is not finite."""
    from lowrank.models import tiny

    where = folder.with_name(f"{folder.name}-base")

    def make() -> None:
        from safetensors.torch import load_file, save_file

        shutil.copytree(tiny.folder("tiny_llama"), where, dirs_exist_ok=True)
        [path] = where.glob("*.safetensors")
        tensors = load_file(path)
        poison(tensors["model.layers.1.mlp.down_proj.weight"], plant.value)
        save_file(tensors, path, metadata={"format": "pt"})

    forks.value(make)
    return where
