"""What outlives a process: an adapter's folder, and a training run's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lowrank.adapters.inject import adapter_state, apply, current_plan, hooks, named_trainable
from lowrank.adapters.sites import adapted
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.data.order import Batches
from lowrank.data.pack import pack
from lowrank.keys import Clock, key
from lowrank.testing.bases import VOCABULARY
from lowrank.testing.trial import HOLDS, SEED, Outcome, Trial, differing, fails, far, logits, values
from lowrank.train import checkpoint, optim
from lowrank.train.hooks import join, split
from lowrank.train.loop import Loop, State
from lowrank.train.loss import target_loss
from lowrank.train.precision import Precision
from lowrank.train.schedule import schedule

CPU = torch.device("cpu")
STEPS = 4


@dataclass(frozen=True)
class Text:
    """A document of random tokens."""

    row: int
    tokens: Sequence[int]
    target: Sequence[bool]


def texts() -> list[Text]:
    """Of unequal lengths, every token but the first a target."""
    made = []
    for row, length in enumerate((5, 9, 3, 8, 6, 4, 7, 2)):
        ids = torch.randint(0, VOCABULARY, (length,), generator=key(0, "text", row)).tolist()
        made.append(Text(row, ids, [True] * length))
    return made


class Training:
    """A run of ``STEPS`` steps, from its beginning or from where ``saved`` left off."""

    def __init__(self, trial: Trial, saved: checkpoint.Saved | None = None) -> None:
        clock = Clock(7)
        self.model = trial.base.fresh()
        planned = trial.plan(self.model, **trial.dropout)
        apply(self.model, planned, SEED, clock, state=saved.tensors["adapter"] if saved else None)
        parameters = named_trainable(self.model)
        self.hooks = hooks(self.model, STEPS)
        self.loop = Loop(
            model=self.model,
            parameters=parameters,
            batches=Batches(texts(), pack, seed=0, micro_batch=2, micro_batch_tokens=None, accumulate=1),
            loss=target_loss,
            optimizer=torch.optim.AdamW(optim.groups(parameters, [], lr=1e-2, weight_decay=0.1)),
            schedule=schedule("linear", warmup=1, total=STEPS),
            precision=Precision("fp32", CPU),
            clock=clock,
            hooks=self.hooks,
            penalty=lambda: sum(module.adapter.penalty() for _, module in adapted(self.model)),
        )
        if saved is not None:
            self.restore(saved)

    def run(self, steps: int) -> Training:
        self.loop.run(steps)
        return self

    def snapshot(self) -> checkpoint.Saved:
        """What a checkpoint of a run holds."""
        tensors, plain = optim.state_tensors(self.loop.optimizer)
        hook_tensors, hook_values = split({str(i): hook.state_dict() for i, hook in enumerate(self.hooks)})
        files = {"adapter": adapter_state(self.model), "optimizer": tensors, "hooks": hook_tensors}
        state: dict[str, Any] = {"loop": asdict(self.loop.state), "optimizer": plain, "hooks": hook_values}
        return checkpoint.Saved({name: kept for name, kept in files.items() if kept}, state)

    def restore(self, saved: checkpoint.Saved) -> None:
        optim.load_state(self.loop.optimizer, saved.tensors.get("optimizer", {}), saved.state["optimizer"])
        self.loop.state = State(**saved.state["loop"])
        states = join(saved.tensors.get("hooks", {}), saved.state["hooks"])
        for i, hook in enumerate(self.hooks):
            hook.load_state_dict(states[str(i)])


def saving(trial: Trial) -> Outcome:
    """An adapter read back from its folder has the same plan, the same bits, and computes the same, after a run too."""
    for model in (trial.trained(), Training(trial).run(STEPS).model.eval()):
        with TemporaryDirectory() as folder:
            save_adapter(model, folder)
            other = load_adapter(trial.base.fresh(), folder, foreign=True)
        if current_plan(other) != current_plan(model):
            return fails("the plan that is read back is another")
        name = differing(values(other), values(model))
        if name:
            return fails(f"{name} is not the same after saving and loading")
        apart = far(logits(other), logits(model), 0.0)
        if apart:
            return fails(f"the model computes something else after loading ({apart}): its file lacks something")
    return HOLDS


def resuming(trial: Trial) -> Outcome:
    """Two steps, a checkpoint on disk, a fresh model and two more steps: the same bits as four steps in one go."""
    whole = Training(trial).run(STEPS)
    with TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), 2, Training(trial).run(2).snapshot())
        resumed = Training(trial, checkpoint.read(path)).run(STEPS)
    name = differing(values(resumed.model), values(whole.model))
    if name:
        return fails(f"{name} is not the same after 2 steps, a checkpoint and 2 more as after {STEPS} in one go")
    one, other = resumed.snapshot(), whole.snapshot()
    for part in ("optimizer", "hooks"):
        name = differing(one.tensors.get(part, {}), other.tensors.get(part, {}))
        if name or one.state[part] != other.state[part]:
            return fails(f"the state of the {part} is not the same after a checkpoint{f' ({name})' if name else ''}")
    apart = far(logits(resumed.model.eval()), logits(whole.model.eval()), 0.0)
    return fails(f"a resumed run's model computes something else ({apart})") if apart else HOLDS
