"""The peer's arm: PEFT and transformers' Trainer, ``python -m benchmarks.peer FOLDER [grouped]``.

Written as their documentation has it: ``get_peft_model``, padded batches from transformers' own collator, prompt and
padding labelled -100, logits at every position. Added is only what makes the arms comparable: our first A, our
order of examples, and a record of what each step saw and lost. ``grouped`` puts examples of like length into one
batch: sorted over all of the run, the longest first, which pads least. The Trainer's own sampler begins to sort only
where there are several times as many examples as a short run has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.arm import Result, now, peak_mb, token_hash, versions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Watch(TrainerCallback):
    """A step's seconds run from the end of the step before to its own: making the batch is part of it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.lrs: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = now(self.device)

    def on_pre_optimizer_step(self, *args: Any, optimizer: torch.optim.Optimizer, **kwargs: Any) -> None:
        self.lrs.append(float(optimizer.param_groups[0]["lr"]))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        at = now(self.device)
        self.seconds.append(at - self.last)
        self.last = at


class KeepingLosses(Trainer):
    """The Trainer, each step's loss kept unrounded."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.losses: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


class KeepingBatches:
    """A collator; the (token ids, mask) of what it hands out are kept, to be counted afterwards."""

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        batch = self.collator(features)
        self.batches.append((batch["input_ids"], batch["attention_mask"].bool()))
        return batch


def build(folder: Path, about: dict[str, Any]) -> PeftModel:
    """The model with LoRA on every linear layer but the head, its A ours."""
    base = AutoModelForCausalLM.from_pretrained(about["model"], dtype=DTYPES[about["precision"]]).to(about["device"])
    lora = LoraConfig(**about["lora"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    initial = load_file(folder / "initial" / "adapter_model.safetensors")
    loaded = set_peft_model_state_dict(model, initial)
    lacking = [key for key in loaded.missing_keys if "lora_" in key]
    if lacking or loaded.unexpected_keys:
        raise SystemExit(f"the arms adapt different sites: {[*lacking, *loaded.unexpected_keys][:3]}")
    return model


def options(about: dict[str, Any], outputs: str) -> dict[str, Any]:
    """``TrainingArguments`` of every arm that a Trainer runs: it saves, logs and evaluates nothing."""
    return {
        "output_dir": outputs,
        "use_cpu": about["device"] == "cpu",
        "bf16": about["precision"] == "bf16",
        "gradient_checkpointing": about["recompute"],
        "train_sampling_strategy": "sequential",
        "warmup_steps": 0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **about["trainer"],
    }


def trainer(model: PeftModel, about: dict[str, Any], outputs: str) -> tuple[KeepingLosses, Watch, KeepingBatches]:
    tokenizer = AutoTokenizer.from_pretrained(about["model"])
    collator, watch = KeepingBatches(DataCollatorForSeq2Seq(tokenizer, padding=True)), Watch(about["device"])
    arguments = TrainingArguments(**options(about, outputs))
    made = KeepingLosses(
        model=model, args=arguments, train_dataset=about["examples"], data_collator=collator, callbacks=[watch]
    )
    made.remove_callback(PrinterCallback)
    return made, watch, collator


def main(folder: Path, grouped: bool = False) -> None:
    about = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    if grouped:
        about["examples"].sort(key=lambda example: len(example["input_ids"]), reverse=True)
    model = build(folder, about)
    with TemporaryDirectory(prefix="peft-") as outputs:
        made, watch, collator = trainer(model, about, outputs)
        made.train()
    report("peft", model, about, made, watch, collator)


def report(
    name: str, model: Any, about: dict[str, Any], made: Any, watch: Watch, collator: KeepingBatches, *more: str
) -> None:
    """Prints the result; ``more`` are packages whose versions matter."""
    peak = peak_mb(about["device"])
    batches = collator.batches[: about["trainer"]["max_steps"]]
    Result(
        arm=name,
        losses=made.losses,
        lrs=watch.lrs,
        seconds=watch.seconds,
        real_tokens=[int(mask.sum()) for _, mask in batches],
        positions=[ids.numel() for ids, _ in batches],
        token_hashes=[token_hash(ids[mask].tolist()) for ids, mask in batches],
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        peak_mb=peak,
        threads=torch.get_num_threads(),
        versions=versions(["peft", "accelerate", "torch", "transformers", *more]),
    ).print()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "grouped" in sys.argv[2:])
