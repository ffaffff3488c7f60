"""The work that both arms of ``vs_peft.py`` do: ``python -m benchmarks.task FOLDER`` makes it ready.

FOLDER has a ``task.json`` already and gets, for the other arm, which imports nothing of this package,
``examples.json`` (the model's folder, every hyperparameter, and the examples in our order) and ``initial/`` (our
adapter before the first step, in PEFT's format).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

IGNORED = -100  # the label that transformers' loss leaves out


@dataclass(frozen=True)
class Task:
    model: str  # smollm2, tiny_llama, or what model.name takes
    data: str  # stdlib, or the path of a .jsonl file
    steps: int  # warm-up included
    warmup: int  # steps that are not timed
    micro_batch: int  # examples a step

    @property
    def overrides(self) -> list[str]:
        """The run as ``python train.py`` takes it: nothing is evaluated, generated or saved but the adapter."""
        kind = [f"model={self.model}"]
        if self.model not in ("smollm2", "tiny_llama"):
            kind = ["model=hf", f"model.name='{self.model}'"]
        data = ["data=stdlib"]
        if self.data != "stdlib":
            data = ["data=jsonl", f"data.path='{Path(self.data).resolve()}'"]
        return [
            *kind,
            *data,
            "model.dtype=fp32",
            "adapter=lora",
            "adapter.r=16",
            "adapter.alpha=16",
            "adapter.targets=all-linear",
            "optim=adamw",
            "schedule=linear",
            "schedule.warmup=0",
            "loop.device=cpu",
            "loop.precision=fp32",
            f"loop.steps={self.steps}",
            f"loop.micro_batch={self.micro_batch}",
            "loop.accumulate=1",
            "loop.max_grad_norm=0.3",
            "eval.before=false",
            "eval.every=0",
            "eval.limit=1",
            "eval.generate.limit=0",
            "checkpoint.every=0",
        ]

    def write(self, folder: Path) -> None:
        (folder / "task.json").write_text(json.dumps(asdict(self)), encoding="utf-8")


def read(folder: Path) -> Task:
    return Task(**json.loads((folder / "task.json").read_text(encoding="utf-8")))


def prepare(folder: Path) -> None:
    """Writes what the other arm reads: one seed gives both arms the same examples and the same A."""
    import lowrank
    from lowrank import assemble, compose
    from lowrank.models.load import folder as model_folder

    task = read(folder)
    config = compose.compose(task.overrides)
    parts = assemble.parts(config)
    data, loaded = assemble.data(config, parts.tokenizer), assemble.load(parts)
    order = assemble.batches(config, data, loaded.collate)
    examples = [data.train[i] for step in range(1, task.steps + 1) for micro in order.indices(step) for i in micro]
    about = {
        "model": str(model_folder(config.model)),
        "warmup": task.warmup,
        "examples": [labelled(example.tokens, example.target) for example in examples],
        "lora": {"r": config.adapter.options["r"], "lora_alpha": config.adapter.options["alpha"]},
        "trainer": {
            "max_steps": task.steps,
            "per_device_train_batch_size": task.micro_batch,
            "gradient_accumulation_steps": config.loop.accumulate,
            "learning_rate": config.optim.lr,
            "adam_beta1": config.optim.options["betas"][0],
            "adam_beta2": config.optim.options["betas"][1],
            "adam_epsilon": config.optim.options["eps"],
            "weight_decay": config.optim.weight_decay,
            "max_grad_norm": config.loop.max_grad_norm,
            "lr_scheduler_type": config.schedule.kind,
        },
    }
    (folder / "examples.json").write_text(json.dumps(about), encoding="utf-8")
    lowrank.export_peft(lowrank.apply(loaded.model, parts.plan, seed=config.loop.seed), folder / "initial")


def labelled(tokens: tuple[int, ...], target: tuple[bool, ...]) -> dict[str, Any]:
    """An example as a user of transformers' collators has it."""
    labels = [token if learnt else IGNORED for token, learnt in zip(tokens, target, strict=True)]
    return {"input_ids": list(tokens), "attention_mask": [1] * len(tokens), "labels": labels}


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
