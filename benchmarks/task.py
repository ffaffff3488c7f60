"""The work that all arms of a comparison do: ``python -m benchmarks.task FOLDER`` makes it ready.

FOLDER has a ``task.json`` already and gets, for the arms that import nothing of this package, ``examples.json`` (the
model's folder, every hyperparameter, the examples in our order and which of them make a step) and ``initial/`` (our
adapter before the first step, in PEFT's format).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, model_folder

IGNORED = -100  # the label that transformers' loss leaves out


@dataclass(frozen=True)
class Task:
    model: str  # smollm2, tiny_llama, a shape of shapes.py, or what model.name takes
    data: str  # stdlib, or the path of a .jsonl file
    steps: int  # warm-up included
    warmup: int  # steps that are not timed
    micro_batch: int | None = 8  # examples a step, or …
    micro_batch_tokens: int | None = None  # … whole examples up to so many tokens
    rank: int = 16  # 0: no LoRA; ``extra`` says which adapter
    targets: str = "all-linear"
    precision: str = "fp32"
    device: str = "cpu"
    recompute: bool = False
    max_length: int = 1024
    extra: tuple[str, ...] = ()  # overrides of our arm alone

    @property
    def overrides(self) -> list[str]:
        """The run as ``python train.py`` takes it: nothing is evaluated, generated or saved but the adapter."""
        return [
            *self.model_overrides,
            *self.data_overrides,
            *self.lora_overrides,
            "optim=adamw",
            "schedule=linear",
            "schedule.warmup=0",
            f"loop.device={self.device}",
            f"loop.precision={self.precision}",
            f"loop.steps={self.steps}",
            f"loop.micro_batch={self.micro_batch or 'null'}",
            f"loop.micro_batch_tokens={self.micro_batch_tokens or 'null'}",
            "loop.accumulate=1",
            "loop.max_grad_norm=0.3",
            f"loop.gradient_checkpointing={str(self.recompute).lower()}",
            "eval.before=false",
            "eval.every=0",
            "eval.limit=1",
            "eval.generate.limit=0",
            "checkpoint.every=0",
            *self.extra,
        ]

    @property
    def model_overrides(self) -> list[str]:
        kind = [f"model={self.model}"]
        if self.model not in ("smollm2", "tiny_llama"):
            name = model_folder(self.model) if self.model in SHAPES else self.model
            kind = ["model=hf", f"model.name='{name}'"]
        return [*kind, f"model.dtype={self.precision}"]

    @property
    def lora_overrides(self) -> list[str]:
        if not self.rank:
            return []
        return ["adapter=lora", f"adapter.r={self.rank}", "adapter.alpha=16", f"adapter.targets='{self.targets}'"]

    @property
    def data_overrides(self) -> list[str]:
        if self.data == "stdlib":
            return ["data=stdlib"]
        return ["data=jsonl", f"data.path='{Path(self.data).resolve()}'", f"data.max_length={self.max_length}"]

    def write(self, folder: Path) -> None:
        (folder / "task.json").write_text(json.dumps(asdict(self)), encoding="utf-8")


def read(folder: Path) -> Task:
    about = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    return Task(**{**about, "extra": tuple(about["extra"])})


def prepare(folder: Path) -> None:
    """Writes what the other arms read: one seed gives all arms the same examples and the same A."""
    import lowrank
    from lowrank import assemble, compose
    from lowrank.models.load import folder as folder_of

    task = read(folder)
    config = compose.compose(task.overrides)
    parts = assemble.parts(config)
    data, loaded = assemble.data(config, parts.tokenizer), assemble.load(parts)
    order = assemble.batches(config, data, loaded.collate)
    steps = [[i for micro in order.indices(step) for i in micro] for step in range(1, task.steps + 1)]
    examples = [data.train[i] for step in steps for i in step]
    about = {
        "model": str(folder_of(config.model)),
        "warmup": task.warmup,
        "device": task.device,
        "precision": task.precision,
        "recompute": task.recompute,
        "examples": [labelled(example.tokens, example.target) for example in examples],
        "steps": [len(step) for step in steps],  # examples of each
        "lora": {"r": config.adapter.options["r"], "lora_alpha": config.adapter.options["alpha"]},
        "trainer": trainer_options(config, task),
    }
    (folder / "examples.json").write_text(json.dumps(about), encoding="utf-8")
    lowrank.export_peft(lowrank.apply(loaded.model, parts.plan, seed=config.loop.seed), folder / "initial")


def trainer_options(config: Any, task: Task) -> dict[str, Any]:
    """As transformers' ``TrainingArguments`` has them."""
    return {
        "max_steps": task.steps,
        "per_device_train_batch_size": task.micro_batch or 1,
        "gradient_accumulation_steps": config.loop.accumulate,
        "learning_rate": config.optim.lr,
        "adam_beta1": config.optim.options["betas"][0],
        "adam_beta2": config.optim.options["betas"][1],
        "adam_epsilon": config.optim.options["eps"],
        "weight_decay": config.optim.weight_decay,
        "max_grad_norm": config.loop.max_grad_norm,
        "lr_scheduler_type": config.schedule.kind,
    }


def labelled(tokens: tuple[int, ...], target: tuple[bool, ...]) -> dict[str, Any]:
    """An example as a user of transformers' collators has it."""
    labels = [token if learnt else IGNORED for token, learnt in zip(tokens, target, strict=True)]
    return {"input_ids": list(tokens), "attention_mask": [1] * len(tokens), "labels": labels}


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
