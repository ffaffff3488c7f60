"""What a comparison shows: which figures and keys, each group's place, its difference from one of them, its fronts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank.compare.direction import COSTS, higher_is_better
from lowrank.compare.front import front
from lowrank.compare.groups import Group, Results, Tested
from lowrank.compare.keys import natural
from lowrank.compare.student import Estimate
from lowrank.errors import ConfigError, did_you_mean
from lowrank.report.figures import clean, number

QUALITY = "eval.after.loss"
BESIDE = ("eval.after.rougeL",)  # shown too where no metric is asked for


@dataclass(frozen=True)
class Choice:
    """What was asked for; empty: what tells most."""

    metrics: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()  # () those that differ and do not follow from another; ("all",) every one that differs
    sort: str = ""  # a metric or a key; empty: the first metric
    reverse: bool = False
    against: str = "best"
    higher: tuple[str, ...] = ()  # metrics of which more is better, beside those that are known for it


@dataclass(frozen=True)
class Row:
    group: Group
    estimates: dict[str, Estimate | None]
    tested: dict[str, Tested | None]  # from the reference
    fronts: tuple[str, ...]  # the costs on whose front it is
    reference: bool


@dataclass(frozen=True)
class Ranking:
    results: Results
    rows: list[Row]  # sorted
    metrics: list[str]  # the first is the quality
    keys: list[str]
    left_out: list[str]  # keys that differ and are no column
    costs: list[str]
    reference: Group | None
    choice: Choice

    @property
    def quality(self) -> str:
        return self.metrics[0]

    def higher(self, metric: str) -> bool:
        return metric in self.choice.higher or higher_is_better(metric)

    @property
    def seeded(self) -> bool:
        """Whether a group has more than one run, and so an interval."""
        return any(len(row.group.runs) > 1 for row in self.rows)

    @property
    def unmeasured(self) -> list[str]:
        """The finished runs without a finite value of the quality."""
        runs = [run for row in self.rows for run in row.group.runs.values()]
        return [run.name for run in runs if run.metric(self.quality) is None]


def ranked(results: Results, choice: Choice = Choice()) -> Ranking:
    """Raises ConfigError for a metric, key or group that no run has."""
    metrics = chosen_metrics(results, choice)
    keys = chosen_keys(results, choice)
    left_out = [] if choice.keys else [key for key in results.differing if key not in keys]
    costs = [cost for cost in COSTS if cost in metrics and cost != metrics[0]]
    higher = metrics[0] in choice.higher or higher_is_better(metrics[0])
    reference = against(results, choice.against, metrics[0], higher) if results.groups else None
    rows = [*rows_of(results, metrics, costs, reference, higher)]
    ranking = Ranking(results, rows, metrics, keys, left_out, costs, reference, choice)
    return sort(ranking)


def rows_of(
    results: Results, metrics: Sequence[str], costs: Sequence[str], reference: Group | None, higher: bool
) -> list[Row]:
    groups = results.groups
    estimates = [{metric: group.estimate(metric) for metric in metrics} for group in groups]
    means = {metric: [found[metric].mean if found[metric] else None for found in estimates] for metric in metrics}  # type: ignore[union-attr]
    tested = {metric: results.differences(metric, reference) if reference else [] for metric in metrics}
    fronts = {cost: front(means[metrics[0]], means[cost], higher=higher) for cost in costs}
    return [
        Row(
            group,
            estimates[place],
            {metric: tested[metric][place] for metric in metrics},
            tuple(cost for cost in costs if fronts[cost][place]),
            group is reference,
        )
        for place, group in enumerate(groups)
    ]


def chosen_metrics(results: Results, choice: Choice) -> list[str]:
    """Those asked for, or the held-out loss and what is measured beside it; and the costs that they have."""
    there = results.metrics()
    for name in choice.metrics if results.groups else ():
        if name not in there:
            raise ConfigError(
                f"--metric {name}: no finished run has it.{did_you_mean(name, there)} There are: {', '.join(there)}."
            )
    evaluated = [name for name in there if name.startswith("eval.after.")]
    usual = [name for name in (QUALITY, *BESIDE) if name in there] or evaluated[:1] or ["tokens_per_s"]
    if results.groups and QUALITY in there and not choice.metrics:
        usual = [QUALITY, *(name for name in usual if name != QUALITY)]
    wanted = list(choice.metrics or usual)
    return list(dict.fromkeys([*wanted, *(cost for cost in COSTS if cost in there)]))


def chosen_keys(results: Results, choice: Choice) -> list[str]:
    if choice.keys == ("all",):
        return results.differing
    if not choice.keys:
        return results.telling
    there = list(dict.fromkeys(key for group in results.groups for key in group.keys))
    for key in choice.keys if results.groups else ():
        if key in results.over:
            raise ConfigError(
                f"--keys {key}: the groups are over it; leave it out of --group-over to have it as a column."
            )
        if key not in there:
            raise ConfigError(f"--keys {key}: no run has this key.{did_you_mean(key, there)}")
    return list(choice.keys)


def against(results: Results, wanted: str, metric: str, higher: bool) -> Group | None:
    """The group that the others are measured against: ``best``, ``first``, a run's name, or ``KEY=VALUE,…``."""
    if wanted == "first":
        return results.groups[0]
    if wanted == "best":
        return results.best(metric, higher) if any(group.estimate(metric) for group in results.groups) else None
    named = [group for group in results.groups if any(run.name == wanted for run in group.runs.values())]
    pairs = [tuple(part.split("=", 1)) for part in wanted.split(",") if "=" in part]
    fitting = [g for g in results.groups if pairs and all(g.text(pair[0]) == pair[1] for pair in pairs)]
    chosen = named or fitting
    if len(chosen) != 1:
        some = "; ".join(group.label(results.telling) for group in (chosen or results.groups)[:5])
        raise ConfigError(
            f"--against {clean(wanted)}: {len(chosen)} groups are that; one. "
            f"Write best, first, a run's name, or KEY=VALUE[,KEY=VALUE]: {some}"
        )
    return chosen[0]


def sort(ranking: Ranking) -> Ranking:
    """By the metric, the best first and what has none last; by a key, its values ascending."""
    name, rows = ranking.choice.sort or ranking.quality, ranking.rows
    if name in ranking.metrics or name in ranking.results.metrics():
        higher = ranking.higher(name) != ranking.choice.reverse
        means = {id(row): row.group.estimate(name) for row in rows}
        known = [row for row in rows if means[id(row)]]
        known.sort(key=lambda row: means[id(row)].mean, reverse=higher)  # type: ignore[union-attr]
        rows = known + [row for row in rows if not means[id(row)]]
    elif any(name in row.group.keys for row in rows):
        rows = sorted(rows, key=lambda row: by_value(row.group, name), reverse=ranking.choice.reverse)
    elif rows and ranking.choice.sort:
        there = [*ranking.metrics, *ranking.results.differing]
        raise ConfigError(f"--sort {name}: neither a figure nor a key of these runs.{did_you_mean(name, there)}")
    return Ranking(**{**vars(ranking), "rows": rows})


def by_value(group: Group, key: str) -> tuple[bool, float, list[tuple[int, float, str]]]:
    found = number(group.keys.get(key))
    return (found is None, found or 0.0, natural(group.text(key)))
