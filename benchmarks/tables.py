"""The tables of README.md, written between its marks, and the pictures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import curves, goals, results
from benchmarks.goals import Goal, spread
from benchmarks.marks import placed

HERE = Path(__file__).parent
PLACES = ("bench", "curves", "bench-cuda")  # marks: <!-- bench: … --> … <!-- /bench -->
FIGURES = {
    "tokens_per_s": ("tokens/s", ",.0f"),
    "seconds": ("seconds a step", ".2f"),
    "peak_mb": ("peak, MB", ",.0f"),
    "saved_mb": ("kept for backward, MB", ",.1f"),
    "formula_mb": ("formula, MB", ",.1f"),
    "extra_mb": ("above inputs and result, MB", ",.0f"),
}


def told(found: Mapping[str, Any]) -> str:
    """All tables, for a terminal."""
    return "\n\n".join(text for text in (parts(found)[place] for place in PLACES) if text)


def parts(found: Mapping[str, Any]) -> dict[str, str]:
    cpu = [name for name, piece in found.items() if piece["about"]["device"] == "cpu"]
    detail = [details(name, found[name]) for name in cpu if "curve" not in found[name] and name != "rates"]
    shown = [name for name in found if "curve" in found[name]]
    pictures = [f"![{found[name]['curve']['title']}](plots/{name}.png)" for name in shown]
    return {
        "bench": "\n\n".join([table([*goals.TABLE, *goals.LEDGER], found), *detail, *conditions(found, cpu)]),
        "curves": "\n\n".join([table(goals.CURVES, found), *pictures]),
        "bench-cuda": table(goals.CUDA, found),
    }


def table(rows: Sequence[Goal], found: Mapping[str, Any]) -> str:
    return "\n".join(["| | goal | measured | |", "| --- | --- | --- | --- |", *(goal.row(found) for goal in rows)])


def details(name: str, piece: Mapping[str, Any]) -> str:
    """A piece's arms: medians with lowest and highest."""
    arms = piece["arms"]
    there = [figure for figure in FIGURES if any(figure in arm for arm in arms.values())]
    head = ["", *(FIGURES[figure][0] for figure in there)]
    lines = [f"| {' | '.join([name or '', *head[1:]])} |", f"| --- |{' ---: |' * len(there)}"]
    for arm, values in arms.items():
        cells = [spread(values[figure], FIGURES[figure][1]) if figure in values else "" for figure in there]
        if "failed" in values:
            cells[0] = ", ".join(values["failed"])
        lines.append(f"| {' | '.join([arm, *cells])} |")
    return "\n".join(lines)


def conditions(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What a reader needs to judge the figures, and to make them again: a line for each set of conditions."""
    said: dict[str, list[str]] = {}
    for name in names:
        about = found[name]["about"]
        versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
        threads = f"{about['threads']} {'thread' if about['threads'] == 1 else 'threads'}"
        text = (
            f"{about['cpu']}, {about['cores']} cores, {threads} ({', '.join(about['flags']) or 'no AVX'}); {versions}; "
            f"commit {about['commit'] or 'unknown'}; `{about['command']}`"
        )
        said.setdefault(text, []).append(f"{name} ({about['others']:.0%})")
    note = "Other processes took at most the share in brackets of the machine's time."
    return [f"{note}\n\n" + "\n".join(f"- {', '.join(of)}: {text}." for text, of in said.items())] if said else []


def front(found: Mapping[str, Any]) -> str:
    """What the project's own README shows of it: speed and memory of the four programs, and ours in each peer's."""
    arms: Mapping[str, Any] = found["peers"]["arms"]
    ours = goals.OURS
    lines = [
        "| | real tokens/s | lowrank: faster | peak memory, MB | lowrank: share of it |",
        "|---|---:|---:|---:|---:|",
    ]
    for arm, values in arms.items():
        cells = [arm]
        for name, form in (("tokens_per_s", ",.0f"), ("peak_mb", ",.0f")):
            times = goals.ratio("peers", ours, arm, name)(found)
            cells += [spread(values[name], form), "" if arm == ours else f"{spread(times, '.2f')}×"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """results/results.json, plots/ and the tables between the marks of README.md, and of that above ``folder``."""
    results.write(folder / "results", found)
    for name, piece in found.items():
        if "curve" in piece:
            about = f"{piece['about']['device']}, {piece['about']['commit']}"
            curves.png(curves.drawn(name, found), folder / "plots" / f"{name}.png", about)
    renew(folder / "README.md", parts(found))
    if folder == HERE and "peers" in found:
        renew(folder.parent / "README.md", {"peers": front(found)})


def renew(readme: Path, contents: Mapping[str, str]) -> None:
    text = readme.read_text(encoding="utf-8")
    for place, content in contents.items():
        text = placed(text, place, "bench.py --write", content)
    readme.write_text(text, encoding="utf-8")
