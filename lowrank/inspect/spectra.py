"""What adapters have learnt, site by site: how far each has moved its weight, in how many directions, and how far two
models moved theirs in the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lowrank.adapters.sites import TRAINED, adapted, place, short_names
from lowrank.adapters.spectrum import Overlap, Spectrum, in_use, overlap, spectrum, update
from lowrank.errors import ConfigError

LISTED = 64  # singular values of a site that the JSON holds; the ranks are of all
MEANS = ("change", "effective_rank", "stable_rank")
ORDER = ("first", "second")


@dataclass(frozen=True)
class Other:
    """An adapter that is no change of a weight: the norms of its parameters by name."""

    path: str
    method: str
    norms: dict[str, float]


@dataclass(frozen=True)
class Learnt:
    """What the adapters of one model have done, in the order of their paths."""

    sites: tuple[Spectrum, ...]
    others: tuple[Other, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        names = short_names(site.path for site in self.sites)
        sites = [
            {"path": site.path, "type": names[site.path], "layer": place(site.path)[1]}
            | {name: value for name, value in asdict(site).items() if name not in ("path", "changed_base")}
            | {"singular": None if site.singular is None else site.singular[:LISTED]}
            for site in self.sites
        ]
        types = [
            {"type": name, "sites": len(group)} | {measure: mean_of(group, measure) for measure in MEANS}
            for name, group in groups(self.sites).items()
        ]
        others = [asdict(other) for other in self.others]
        return {"sites": sites, "types": types, "others": others, "notes": list(self.notes)}


@dataclass(frozen=True)
class Spectra:
    """One model's or, with their overlap, two models'. ``print`` shows a table, ``to_dict`` is its JSON."""

    models: tuple[Learnt, ...]
    overlaps: tuple[Overlap, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "models": [learnt.to_dict() for learnt in self.models],
            "overlaps": [asdict(found) for found in self.overlaps],
        }

    def __str__(self) -> str:
        return both(self) if len(self.models) == 2 else alone(self.models[0])


def spectra(models: Sequence[nn.Module], most: float = math.inf) -> Spectra:
    """What the adapters of a model have learnt, or of two models on one base, with the overlap of their subspaces.

    Singular values that would take more than ``most`` multiplications a site are left out, and that is said. Raises
    ConfigError where a model carries no adapter, or where two have a site of one path and of different shapes.
    """
    found = Spectra(tuple(learnt(model, most) for model in models))
    if len(models) != 2:
        return found
    first, second = (dict(adapted(model)) for model in models)
    overlaps = []
    for path in sorted(first.keys() & second.keys(), key=natural):
        one, other = update(path, first[path]), update(path, second[path])
        if one is None or other is None:
            continue
        if one.shape != other.shape:
            raise ConfigError(f"{path} is {one.shape} in one model and {other.shape} in the other: not one base.")
        if (shared := overlap(one, other)) is not None:
            overlaps.append(shared)
    return Spectra(found.models, tuple(overlaps))


def learnt(model: nn.Module, most: float) -> Learnt:
    sites, others = [], []
    for path, module in sorted(adapted(model), key=lambda site: natural(site[0])):
        adapter = in_use(module)
        if (found := update(path, module)) is not None:
            sites.append(spectrum(found, most))
        elif adapter is not None:
            norms = {name: float(p.detach().norm()) for name, p in adapter.named_parameters()}
            others.append(Other(path, type(adapter).__name__, norms))
    trained = getattr(model, TRAINED, ())
    if not (sites or others or trained):
        raise ConfigError("inspect adapter: the model carries no adapter.")
    return Learnt(tuple(sites), tuple(others), tuple(notes(sites, trained)))


def notes(sites: Sequence[Spectrum], trained: Sequence[Any]) -> Iterable[str]:
    """What the table cannot show."""
    if trained:
        methods = ", ".join(sorted({row.method for row in trained}))
        yield (
            f"{len(trained)} tensors of the base train themselves ({methods}, {sum(r.parameters for r in trained):,} "
            f"values): what they were before is not kept, so how far they moved is not known"
        )
    if lost := sum(site.changed_base for site in sites):
        yield (
            f"{lost} sites: the weight before the adapter's start was not kept, so ΔW is relative to what the start "
            f"made of it"
        )
    if left_out := sum(site.singular is None for site in sites):
        yield f"{left_out} sites: singular values left out for their cost; `lowrank inspect adapter` computes them"


def natural(path: str) -> tuple[tuple[bool, int, str], ...]:
    """Sorts layer 10 behind layer 9."""
    return tuple((not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split("."))


def alone(found: Learnt) -> str:
    """A line a site, then the means of the sites of one name."""
    head = ["site", "method", "shape", "‖ΔW‖/‖W‖", "σ₁", "σ₂", "σ₃", "effective rank", "stable rank"]
    rows = [
        [site.path, site.method, "×".join(map(str, site.shape)), sized(site.change)]
        + [sized(value) for value in (*(site.singular or ()), None, None, None)[:3]]
        + [fixed(site.effective_rank), fixed(site.stable_rank)]
        for site in found.sites
    ]
    means = [
        [f"mean of {name} ({len(group)})", "", "", sized(mean_of(group, "change")), "", "", ""]
        + [fixed(mean_of(group, measure)) for measure in ("effective_rank", "stable_rank")]
        for name, group in groups(found.sites).items()
    ]
    others = [
        f"{other.path}  {other.method}  " + ", ".join(f"‖{name}‖ {sized(norm)}" for name, norm in other.norms.items())
        for other in found.others
    ]
    return "\n".join([*(aligned([head, *rows, *means], words=3) if rows else []), *others, *found.notes])


def both(found: Spectra) -> str:
    """A line a site that two models share, with the overlap of their largest direction and of all they have."""
    first, second = ({site.path: site for site in learnt.sites} for learnt in found.models)
    sizes = ["‖ΔW‖/‖W‖ first", "second", "effective rank first", "second"]
    head = ["site", *sizes, "φ(1,1) left", "right", "φ of all left", "right", "by chance"]
    measures = {path: compared(first[path], second[path], None) for path in first if path in second}
    measures |= {one.path: compared(first[one.path], second[one.path], one) for one in found.overlaps}
    rows = [[path, *shown(values)] for path, values in measures.items()]
    means = [
        [f"mean of {name} ({len(group)})", *shown([mean(column) for column in zip(*group, strict=True)])]
        for name, group in by_name(measures).items()
    ]
    alone_in = [
        f"only in the {which}: {path}"
        for which, here, there in (("first", first, second), ("second", second, first))
        for path in here
        if path not in there
    ]
    said = [f"{which}: {note}" for which, one in zip(ORDER, found.models, strict=True) for note in one.notes]
    return "\n".join([*(aligned([head, *rows, *means], words=1) if rows else []), *alone_in, *said])


def compared(one: Spectrum, other: Spectrum, shared: Overlap | None) -> list[float | None]:
    """Both changes, both effective ranks; φ(1, 1) and φ of all directions, of left vectors and of right ones; and what
    the last would be between random subspaces, the larger of the two."""
    sizes = [one.change, other.change, one.effective_rank, other.effective_rank]
    if shared is None:
        return [*sizes, *[None] * 5]
    chance = max(shared.first[-1], shared.second[-1]) / min(shared.shape)
    ends = [grid[at][at] for at in (0, -1) for grid in (shared.left, shared.right)]
    return [*sizes, *ends, min(chance, 1.0)]


def shown(values: Sequence[float | None]) -> list[str]:
    return [*(sized(value) for value in values[:2]), *(fixed(value) for value in values[2:])]


def groups(sites: Iterable[Spectrum]) -> dict[str, list[Spectrum]]:
    return by_name({site.path: site for site in sites})


def by_name(found: dict[str, Any]) -> dict[str, list[Any]]:
    """What is known by path, together by what the paths are called whatever their layer."""
    names = short_names(found)
    grouped: dict[str, list[Any]] = {}
    for path, value in found.items():
        grouped.setdefault(names[path], []).append(value)
    return grouped


def mean_of(sites: Iterable[Spectrum], measure: str) -> float | None:
    return mean(getattr(site, measure) for site in sites)


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def sized(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def aligned(rows: Sequence[Sequence[str]], words: int) -> Iterator[str]:
    """Columns: the first ``words`` of them to the left, figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = zip(row, widths, strict=True)
        yield "  ".join(c.ljust(w) if n < words else c.rjust(w) for n, (c, w) in enumerate(cells)).rstrip()
