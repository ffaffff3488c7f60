"""TRL's arm, with Liger's kernels or without: ``python -m benchmarks.sft FOLDER [liger]``.

``SFTTrainer`` over the same PEFT model and the same examples, prompts labelled -100. Exit code 3 where TRL, or Liger
and Triton, are not installed: the arm is then reported as unmeasured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peer import KeepingBatches, Watch, build, options, report

ABSENT = 3


def main(folder: Path, liger: bool) -> None:
    try:
        import datasets
        import trl

        if liger:
            import liger_kernel.transformers  # noqa: F401
    except ImportError as error:
        print(f"not installed: {error}", file=sys.stderr)
        raise SystemExit(ABSENT) from error
    about = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    model = build(folder, about)
    if liger:
        patch(model)

    class KeepingLosses(trl.SFTTrainer):  # type: ignore[misc]
        losses: list[float]

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.losses.append(float(loss))
            return loss

    watch = Watch(about["device"])
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in about["examples"]]
    with TemporaryDirectory(prefix="trl-") as outputs:
        settings = trl.SFTConfig(**options(about, outputs), max_length=None, packing=False, use_liger_kernel=liger)
        made = KeepingLosses(model=model, args=settings, train_dataset=datasets.Dataset.from_list(rows))
        made.losses = []
        made.add_callback(watch)
        collator = KeepingBatches(made.data_collator)
        made.data_collator = collator
        made.train()
    report("trl, liger" if liger else "trl", model, about, made, watch, collator, "trl", *(["liger-kernel"] * liger))


def patch(model: Any) -> None:
    """Liger's kernels on a model that is there already."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model.get_base_model())


if __name__ == "__main__":
    main(Path(sys.argv[1]), "liger" in sys.argv[2:])
