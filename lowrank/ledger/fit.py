"""The ledger turned round: which settings of a run fit a budget of memory, the fastest first.

Told apart are settings that train the same (the step's batch cut into more micro-batches, activations computed again)
and those that do not (8-bit optimizer state, a 4-bit base, shorter texts), which say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowrank.assemble import Data, Parts
from lowrank.ledger.ledger import Ledger
from lowrank.ledger.predict import predict
from lowrank.ledger.room import gib
from lowrank.ledger.trials import Trial, alike, otherwise, shorter

# Of a weight, once a pass and micro-batch, in FLOPs that take as long: reading it, and making it of 4 bits.
READING, MAKING = 100, 400
AGAIN = {"off": 0.0, "selective": 0.45, "block": 0.9}  # of the forward's FLOPs, what recomputation repeats
WORTH = 0.05  # of the peak, below which the optimizer's state is not made smaller
HAIR = 1.02


@dataclass(frozen=True)
class Setting:
    """``overrides`` to add to the command; ``speed`` in tokens a second beside the configuration's own, estimated by
    the FLOPs, the passes over weights and the micro-batch; ``changes`` what is computed otherwise."""

    overrides: tuple[str, ...]
    ledger: Ledger
    speed: float
    changes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(self.overrides) or "as it is"


def fits(
    parts: Parts, data: Data | None, budget: int, interpreter: int | None = None, most: int | None = None
) -> list[Setting]:
    """The settings whose predicted peak is at most ``budget`` bytes, the fastest first; of each kind the one with the
    largest micro-batch. ``most``: stop at so many. ``interpreter``: bytes of the process before the model, where it is
    not what it is now. Empty where nothing fits."""
    return Search(parts, data, budget, interpreter).found(most)


def smallest(parts: Parts, data: Data | None, interpreter: int | None = None) -> Setting:
    """What needs least of all that is tried."""
    search = Search(parts, data, 0, interpreter)
    search.found(None)
    return min(search.known.values(), key=lambda setting: setting.ledger.peak)


class Search:
    """Predictions are kept, since each takes a second or two."""

    def __init__(self, parts: Parts, data: Data | None, budget: int, interpreter: int | None = None) -> None:
        self.parts, self.budget, self.interpreter = parts, budget, interpreter
        self.known: dict[tuple[str, ...], Setting] = {}
        self.own = self.setting(Trial(parts, data))
        self.interpreter = self.own.ledger.parts["interpreter"]  # predicting makes the process itself grow
        self.start = self.judged_apart(Trial(parts, data))

    def judged_apart(self, trial: Trial) -> Trial:
        """With texts generated one by one where generating is what takes most: nothing trains otherwise."""
        config = trial.parts.config
        if self.own.ledger.when != "evaluation" or config.eval.generate.batch == 1:
            return trial
        judged = replace(config.eval, generate=replace(config.eval.generate, batch=1))
        apart = replace(
            trial, parts=replace(trial.parts, config=replace(config, eval=judged)), overrides=("eval.generate.batch=1",)
        )
        return apart if self.setting(apart).ledger.peak < self.own.ledger.peak else trial

    def found(self, most: int | None = None) -> list[Setting]:
        """Runs that train otherwise are tried where the configuration itself does not fit, and shorter texts where
        nothing else does."""
        own = self.own.ledger
        found = [self.own] if own.peak <= self.budget else []
        for kind in alike(self.start):
            found += self.fitting(kind, most is None or len(found) < most)
        worth = own.parts["optimizer"] + own.parts["adapters"] > WORTH * own.peak
        for kinds in [] if self.own in found else otherwise(self.start, worth):
            first = next((one for kind in kinds if (one := self.fitting(kind, most is None or len(found) < most))), [])
            found += first
        if not found:
            found = self.fitting(shorter(self.start), True)
        return sorted(useful(found), key=lambda setting: -setting.speed)

    def fitting(self, kind: Sequence[Trial], wanted: bool) -> list[Setting]:
        best = self.largest(kind) if wanted else None
        return [best] if best is not None and best.overrides else []

    def largest(self, trials: Sequence[Trial]) -> Setting | None:
        """The first of ``trials``, whose need falls from one to the next, that fits, by halving."""
        best = self.setting(trials[-1]) if trials else None
        if best is None or best.ledger.peak > self.budget:
            return None
        low, high = 0, len(trials) - 1
        while low < high:
            middle = (low + high) // 2
            setting = self.setting(trials[middle])
            if setting.ledger.peak <= self.budget:
                high, best = middle, setting
            else:
                low = middle + 1
        return best

    def setting(self, trial: Trial) -> Setting:
        if trial.overrides not in self.known:
            ledger = predict(trial.parts, trial.data)
            if self.interpreter is not None:
                ledger = beginning_with(ledger, self.interpreter)
            speed = self.speed(trial, ledger) if trial.overrides else 1.0
            self.known[trial.overrides] = Setting(trial.overrides, ledger, speed, trial.changes)
        return self.known[trial.overrides]

    def speed(self, trial: Trial, ledger: Ledger) -> float:
        """Beside the configuration's own."""
        return self.cost(self.parts, self.own.ledger) / self.cost(trial.parts, ledger)

    def cost(self, parts: Parts, ledger: Ledger) -> float:
        """What a token takes, in FLOPs: its own, as the configuration itself has them; what is computed again; and its
        share of the passes over the weights that a micro-batch makes."""
        flops, mode = self.own.ledger.flops_per_token, parts.config.loop.gradient_checkpointing
        repeated = (AGAIN[mode] - AGAIN[self.parts.config.loop.gradient_checkpointing]) * flops["forward"]
        passes = 2 if mode == "off" else 3
        each = READING + (MAKING if parts.config.quant.kind == "nf4" else 0)
        return flops["total"] + repeated + passes * each * parts.plan.total_parameters / ledger.shape.tokens


def beginning_with(ledger: Ledger, interpreter: int) -> Ledger:
    """The ledger of a process that takes so many bytes before it has a model."""
    more = interpreter - ledger.parts["interpreter"]
    phases = {name: size + more for name, size in ledger.phases.items()}
    return replace(ledger, parts={**ledger.parts, "interpreter": interpreter}, phases=phases)


def useful(settings: Sequence[Setting]) -> list[Setting]:
    """Without those that another one of no more changes beats in speed, at no more than a hair's more need."""
    return [
        one
        for one in settings
        if not any(
            set(other.changes) <= set(one.changes)
            and other.speed >= one.speed
            and other.ledger.peak <= HAIR * one.ledger.peak
            and other is not one
            for other in settings
        )
    ]


def table(settings: Sequence[Setting], budget: int, tokens_per_s: float | None) -> str:
    """A line a setting: what to paste, its need, its speed, and what it changes."""
    lines = [f"fit {gib(budget)}, the fastest first (add one line to the command):"]
    width = max(len(str(one)) for one in settings)
    for one in settings:
        speed = f"≈ {one.speed * tokens_per_s:,.0f} tokens/s" if tokens_per_s else f"≈ {one.speed:.2f}× the speed"
        changes = f"  changes what is computed: {', '.join(one.changes)}" if one.changes else ""
        lines.append(f"  {one!s:<{width}}  {gib(one.ledger.peak):>9}  {speed}{changes}")
    return "\n".join(lines)
