"""Everything that moves while a run trains: as a checkpoint holds it, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lowrank.adapters.inject import adapter_state
from lowrank.train import optim
from lowrank.train.checkpoint import Saved
from lowrank.train.hooks import join, split
from lowrank.train.loop import Loop, State
from lowrank.train.metrics import Lines


@dataclass(frozen=True)
class Moving:
    """Of one run; ``put_back`` on the same parts, freshly made, gives the bits that ``saved`` has seen.

    ``hooks`` are those that have a state, and ``lines`` the files that grow, by the names they have in a checkpoint.
    """

    loop: Loop
    hooks: Mapping[str, Any]
    lines: Mapping[str, Lines]

    def saved(self, **more: Any) -> Saved:
        """With ``more`` that a checkpoint's state is to tell."""
        tensors, values = optim.state_tensors(self.loop.optimizer)
        hook_tensors, hook_values = split({name: hook.state_dict() for name, hook in self.hooks.items()})
        state = {
            "loop": asdict(self.loop.state),
            "optimizer": values,
            "optimizer_class": kind(self.loop.optimizer),
            "scaler": self.loop.precision.state_dict(),
            "hooks": hook_values,
            **{name: lines.place() for name, lines in self.lines.items()},
            **more,
        }
        files = {"adapter": adapter_state(self.loop.model), "optimizer": tensors, "hooks": hook_tensors}
        return Saved({name: held for name, held in files.items() if held}, state)

    def put_back(self, saved: Saved) -> None:
        """All but the adapter's tensors, which are there from the start. A hook of which the checkpoint knows nothing
        begins anew, and so does another optimizer than the one that was saved: both had to be allowed."""
        state = saved.state
        if state["optimizer_class"] == kind(self.loop.optimizer):
            optim.load_state(self.loop.optimizer, saved.tensors.get("optimizer", {}), state["optimizer"])
        self.loop.state = State(**state["loop"])
        self.loop.precision.load_state_dict(state["scaler"])
        known = join(saved.tensors.get("hooks", {}), state["hooks"])
        for name, hook in self.hooks.items():
            if name in known:
                hook.load_state_dict(known[name])
        for name, lines in self.lines.items():
            lines.cut(state[name])


def kind(optimizer: Any) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
