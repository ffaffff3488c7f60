"""Runs grouped over their seeds: one configuration, one group; its mean, its interval, its difference from another.

results = gather(["outputs/multirun/ranks"])
for group in results.groups:
    print(group.label(results.differing), group.estimate("eval.after.loss"))
results.differences("eval.after.loss", results.best("eval.after.loss"))   # paired over common seeds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lowrank.compare.direction import higher_is_better
from lowrank.compare.found import CONDITIONS, Found, found
from lowrank.compare.keys import ABSENT, natural, numbers, written
from lowrank.compare.student import Difference, Estimate, holm, interval, paired
from lowrank.errors import ConfigError, did_you_mean
from lowrank.record.directory import SUMMARY
from lowrank.report.figures import clean

SEEDS = ("loop.seed", "data.seed")
CHOICES = ("_target_", "kind")  # keys by whose value the other keys of their node are there at all
NAMES = (*CHOICES, "path", "eval_path", "name", "revision")  # … by whose value code, data and base are what they are

Seeds = tuple[str, ...]  # the values of the keys that were grouped over


@dataclass(frozen=True)
class Group:
    """All finished runs of one configuration."""

    keys: dict[str, Any]  # but for those that were grouped over
    runs: dict[Seeds, Found]

    def values(self, metric: str) -> dict[Seeds, float]:
        """The metric's value for each seed that has one."""
        told = {seeds: run.metric(metric) for seeds, run in self.runs.items()}
        return {seeds: value for seeds, value in told.items() if value is not None}

    def estimate(self, metric: str) -> Estimate | None:
        """Mean and 95 % Student-t interval over seeds; None where no run has the metric."""
        return interval(list(self.values(metric).values()))

    def difference(self, other: Group, metric: str) -> Difference | None:
        """This minus ``other``, paired over the seeds that both have; None where there are none."""
        mine, theirs = self.values(metric), other.values(metric)
        return paired([mine[seeds] - theirs[seeds] for seeds in mine if seeds in theirs])

    def text(self, key: str) -> str:
        return written(self.keys[key]) if key in self.keys else ABSENT

    def label(self, keys: Sequence[str]) -> str:
        """``adapter.r=8 optim.lr=0.001``"""
        return " ".join(f"{key}={clean(self.text(key))}" for key in keys if key in self.keys)


@dataclass(frozen=True)
class Tested:
    """A group's difference from the reference, and its p-value among those of all groups (Holm)."""

    difference: Difference
    p: float | None


@dataclass(frozen=True)
class Results:
    """What some folders hold."""

    runs: list[Found]  # all, in the order of their names
    groups: list[Group]  # of those that are done
    repeats: list[tuple[Found, Found]]  # a run that another one, newer, of the same configuration and seeds replaces
    over: tuple[str, ...]

    @property
    def broken(self) -> list[Found]:
        """The runs that are not done, whatever the cause."""
        return [run for run in self.runs if not run.done]

    @cached_property
    def differing(self) -> list[str]:
        """The keys by whose values the groups differ, in the order of the configuration."""
        names = dict.fromkeys(key for group in self.groups for key in group.keys)
        return [key for key in names if len({(key in group.keys, group.text(key)) for group in self.groups}) > 1]

    @cached_property
    def telling(self) -> list[str]:
        """``differing`` without what follows from the choice of a method or a kind: IA3 has no rank."""
        return [key for key in self.differing if not any(self._follows(key, choice) for choice in self._choices(key))]

    def _choices(self, key: str) -> list[str]:
        if key in CONDITIONS.values():
            return [name for name in self.differing if name.rpartition(".")[2] in NAMES]
        node = key.rpartition(".")[0]
        return [f"{node}.{name}" for name in CHOICES if f"{node}.{name}" in self.differing and f"{node}.{name}" != key]

    def _follows(self, key: str, choice: str) -> bool:
        pairs = {(group.text(choice), group.text(key)) for group in self.groups}
        return len(pairs) == len({chosen for chosen, _ in pairs})

    def metrics(self) -> list[str]:
        """Every figure that a finished run has, under its dotted name."""
        summaries = [run.summary for group in self.groups for run in group.runs.values()]
        return list(dict.fromkeys(name for summary in summaries for name in numbers(summary)))

    def best(self, metric: str, higher: bool | None = None) -> Group:
        """The group with the best mean. Raises ConfigError where none has the metric."""
        known = [(estimate.mean, group) for group in self.groups if (estimate := group.estimate(metric))]
        if not known:
            raise ConfigError(f"no finished run has '{metric}'.{did_you_mean(metric, self.metrics())}")
        sign = -1 if (higher_is_better(metric) if higher is None else higher) else 1
        return min(known, key=lambda pair: sign * pair[0])[1]

    def differences(self, metric: str, reference: Group) -> list[Tested | None]:
        """Of each group from ``reference``, paired over common seeds; None for itself, and where no seed is common."""
        found = [None if group is reference else group.difference(reference, metric) for group in self.groups]
        adjusted = holm([one.p if one else None for one in found])
        return [Tested(one, p) if one else None for one, p in zip(found, adjusted, strict=True)]


def gather(folders: Sequence[str | Path], over: Sequence[str] = SEEDS) -> Results:
    """The runs below ``folders``, grouped over the keys ``over``. Raises ConfigError where there are none."""
    runs = found(folders)
    groups: dict[tuple[tuple[str, str], ...], Group] = {}
    repeats: list[tuple[Found, Found]] = []
    for run in sorted((run for run in runs if run.done), key=age):
        keys = {key: value for key, value in run.keys.items() if key not in over}
        name = tuple((key, written(value)) for key, value in sorted(keys.items()))
        group = groups.setdefault(name, Group(keys, {}))
        seeds = tuple(written(run.keys[key]) if key in run.keys else ABSENT for key in over)
        if seeds in group.runs:
            repeats.append((group.runs[seeds], run))
        group.runs[seeds] = run
    order = sorted(groups.values(), key=lambda group: min(natural(run.name) for run in group.runs.values()))
    for group in order:
        by_seed = sorted(group.runs.items(), key=lambda item: [natural(seed) for seed in item[0]])
        group.runs.clear()
        group.runs.update(by_seed)
    return Results(runs, order, repeats, tuple(over))


def age(run: Found) -> float:
    """When its summary was written."""
    try:
        return (run.folder / SUMMARY).stat().st_mtime
    except OSError:
        return 0.0
