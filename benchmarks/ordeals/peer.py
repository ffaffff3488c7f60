"""The peer's run in a forked child: PEFT LoRA and transformers' Trainer on the same tiny model, saving as often.

Written as transformers' own example scripts are: train, auto-resume from ``get_last_checkpoint``, ``save_model``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.ordeals.arm import EVERY, STEPS, Place

ARGUMENTS = {
    "max_steps": STEPS,
    "save_steps": EVERY,
    "save_total_limit": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.3,
    "seed": 0,
    "use_cpu": True,
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
LORA = {"r": 2, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Peer:
    """Runs of one kind. ``prepare`` gets the Trainer before it trains: what is planted is planted there."""

    name = "PEFT + Trainer"
    places = (
        Place("the first save", Trainer, "_save_checkpoint", 1),
        Place("a later save, which prunes", Trainer, "_save_checkpoint", 3),
        Place("the final adapter", Trainer, "save_model", 5),
    )

    model: Path
    data: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    max_length: int = 1024
    prepare: Callable[[Trainer], None] = lambda trainer: None

    def trainer(self, folder: Path) -> Trainer:
        settings = {**ARGUMENTS, **self.arguments}
        set_seed(settings["seed"])
        base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        made = Trainer(
            model=get_peft_model(base, LoraConfig(**{**LORA, **self.lora})),
            args=TrainingArguments(output_dir=str(folder), **settings),
            train_dataset=self.examples(tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
        made.remove_callback(PrinterCallback)
        return made

    def examples(self, tokenizer: Any) -> Sequence[dict[str, Any]]:
        found = []
        for line in self.data.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            prompt, target = tokenizer(row["instruction"]).input_ids, tokenizer(row["output"]).input_ids[1:]
            ids = [*prompt, *target, tokenizer.eos_token_id][: self.max_length]
            labels = [*([-100] * len(prompt)), *target, tokenizer.eos_token_id][: self.max_length]
            found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        return found

    def with_(self, **arguments: Any) -> Peer:
        """The same with other TrainingArguments."""
        return replace(self, arguments={**self.arguments, **arguments})

    def of(self, model: Path) -> Peer:
        return replace(self, model=model)

    def preparing(self, prepare: Callable[[Trainer], None]) -> Peer:
        return replace(self, prepare=prepare)

    def having(self, *more: str) -> Peer:
        return self

    def keeping(self) -> Peer:
        """The same with every checkpoint kept."""
        return self.with_(save_total_limit=99)

    def program(self, folder: Path) -> None:
        """Trains, from the last checkpoint where there is one, and saves the adapter."""
        trainer = self.trainer(folder)
        self.prepare(trainer)
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model(str(folder / "adapter"))

    again = program

    def ended(self, folder: Path) -> dict[str, str]:
        """The hash of the final adapter, which is all that must be equal in the end."""
        path = folder / "adapter" / "adapter_model.safetensors"
        return {"adapter": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"}

    def newest(self, folder: Path) -> str:
        return ""

    def wrong(self, folder: Path, output: str, newest: str) -> str:
        return ""
