"""The studies of docs/experiments.md: run, and written there from what the runs left.

    python benchmarks/experiments.py run rank_study      # resumable: run again what was broken off
    python benchmarks/experiments.py run rank_study loop.steps=2 model=tiny_llama --folder /tmp/try
    python benchmarks/experiments.py show rank_study     # the section, on standard output
    python benchmarks/experiments.py write               # of all that have runs, into docs/

Two jobs at a time with one thread each, whatever the machine: the losses depend on the threads of a job.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the one above it

from benchmarks import intervals  # noqa: E402
from benchmarks.marks import placed  # noqa: E402
from benchmarks.studies import SAME, STUDIES, Claim, Study  # noqa: E402
from lowrank.compare.groups import Group, Results, gather  # noqa: E402
from lowrank.compare.keys import measured  # noqa: E402
from lowrank.compare.student import Estimate  # noqa: E402

METRIC = "eval.after.loss"
BY = "benchmarks/experiments.py"  # in the page's marks
PAGE, PLOTS = ROOT / "docs" / "experiments.md", ROOT / "docs" / "experiments"
LAUNCHER = ("hydra.launcher.n_jobs=2", "hydra.launcher.threads=1")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "show", "write"])
    parser.add_argument("study", nargs="?", choices=list(STUDIES), help="write: all that have runs, if none is named")
    parser.add_argument("overrides", nargs="*", help="of run: as for train.py")
    parser.add_argument("--folder", type=Path, help="where the runs lie (outputs/experiments/STUDY)")
    options = parser.parse_intermixed_args(arguments)
    if options.study is None and options.what != "write":
        parser.error(f"{options.what}: name a study: {', '.join(STUDIES)}")
    if options.what == "run":
        sys.exit(run(options.study, options.folder or home(options.study), options.overrides))
    names = [options.study] if options.study else [name for name in STUDIES if home(name).is_dir()]
    for name in names:
        found = read(STUDIES[name], options.folder or home(name))
        if options.what == "show":
            print(section(STUDIES[name], *found))
        else:
            write(STUDIES[name], *found)


def home(name: str) -> Path:
    return Path(os.environ.get("LOWRANK_OUTPUTS", ROOT / "outputs")) / "experiments" / name


def run(name: str, folder: Path, overrides: Sequence[str]) -> int:
    """The exit code of the sweep, which skips what is done."""
    code = sweep(folder, [f"experiment={name}", *overrides])
    if name == "nf4_study" and not overrides:
        from benchmarks import fp4  # imports torch

        base = fp4.write(folder.parent / "smollm2-fp4")
        again = ["experiment=_study", "optim.lr=1e-3", "loop.seed=0,1,2", "model=hf", f"model.name='{base.resolve()}'"]
        code = sweep(folder / "fp4", again) or code
    return code


def sweep(folder: Path, overrides: Sequence[str]) -> int:
    given = {override.partition("=")[0] for override in overrides}
    more = [flag for flag in LAUNCHER if flag.partition("=")[0] not in given]
    place = f"hydra.sweep.dir='{folder.resolve()}'"
    train = [sys.executable, "train.py", "-m", *overrides, *more, place]
    return subprocess.run(train, cwd=ROOT, check=False).returncode


def read(study: Study, folder: Path) -> tuple[dict[str, Group], Results]:
    """The arms that have runs, in the paper's order. Raises SystemExit where two sets of runs are mixed."""
    results = gather([folder])
    arms: dict[str, Group] = {}
    for group in results.groups:
        name = study.arm(group.keys)
        if name in arms:
            differ = [key for key in group.keys if group.text(key) != arms[name].text(key)]
            sys.exit(f"{folder}: two groups are '{name}'; they differ in {', '.join(differ)}. Remove one of them.")
        arms[name] = group
    return {name: arms[name] for name in sorted(arms, key=study.order.index)}, results


def write(study: Study, arms: Mapping[str, Group], results: Results) -> None:
    """The study's section between its marks, and its picture."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        placed(text, study.name, "benchmarks/experiments.py", section(study, arms, results)), encoding="utf-8"
    )
    PLOTS.mkdir(exist_ok=True)
    (PLOTS / f"{study.name}.svg").write_text(picture(arms, study.name), encoding="utf-8")


def section(study: Study, arms: Mapping[str, Group], results: Results) -> str:
    parts = [table(arms), f"![held-out loss of each](experiments/{study.name}.svg)", *claims(study, arms)]
    return "\n\n".join([*parts, conditions(arms, results)])


def table(arms: Mapping[str, Group]) -> str:
    """Losses with the intervals of their means, and what differs from the best, seed by seed."""
    means = {name: estimate for name, group in arms.items() if (estimate := group.estimate(METRIC))}
    best = min(means, key=lambda name: means[name].mean)
    rows = []
    for name, estimate in means.items():
        apart = arms[name].difference(arms[best], METRIC) if name != best else None
        trained = measured(next(iter(arms[name].runs.values())).summary, "trainable_parameters") or 0
        cells = [name, f"{trained:,.0f}", ranged(estimate), ranged(apart, "+") if apart else "best", str(estimate.n)]
        rows.append(f"| {' | '.join(cells)} |")
    head = "| | trainable | held-out loss, mean [95 %] | above the best, same seeds [95 %] | seeds |"
    return "\n".join([head, "| --- | ---: | ---: | ---: | ---: |", *rows])


def ranged(found: Estimate, sign: str = "") -> str:
    ends = f" [{found.low:{sign}.3f}, {found.high:{sign}.3f}]" if found.low is not None else ""
    return f"{found.mean:{sign}.3f}{ends}"


def claims(study: Study, arms: Mapping[str, Group]) -> list[str]:
    """Whether each of the paper's findings shows here."""
    lines = []
    for claim in study.claims:
        if claim.first in arms and claim.second in arms:
            lines.append(f"- {claim.says[0].upper()}{claim.says[1:]}: {verdict(claim, arms)}")
        else:
            lacking = " and ".join(name for name in (claim.first, claim.second) if name not in arms)
            lines.append(f"- {claim.says[0].upper()}{claim.says[1:]}: not tried here ({lacking}).")
    return ["\n".join(lines)] if lines else []


def verdict(claim: Claim, arms: Mapping[str, Group]) -> str:
    """**shows**, **does not show**, **the opposite shows** or **is not decided**, with the difference it rests on."""
    found = arms[claim.first].difference(arms[claim.second], METRIC)
    if found is None or found.low is None or found.high is None:
        return "**is not decided**: fewer than two seeds in common."
    told = f"{ranged(found, '+')} nats a token, {found.n} seeds"
    if claim.same:
        inside, outside = found.low > -SAME and found.high < SAME, found.low > SAME or found.high < -SAME
        said = "shows" if inside else "does not show" if outside else "is not decided"
    else:
        said = "shows" if found.high < 0 else "the opposite shows" if found.low > 0 else "is not decided"
    return f"**{said}** ({told})."


def conditions(arms: Mapping[str, Group], results: Results) -> str:
    """What the figures depend on, and what is missing."""
    runs = [run for group in arms.values() for run in group.runs.values()]

    def told(name: str) -> str:
        return ", ".join(dict.fromkeys(str(run.summary.get(name)) for run in runs))

    steps = ", ".join(dict.fromkeys(str(run.keys["loop.steps"]) for run in runs))
    seconds = sum(measured(run.summary, "seconds") or 0.0 for run in runs)
    torch = ", ".join(dict.fromkeys(str(versions(run.summary).get("torch")) for run in runs))
    failed = f" {len(results.broken)} not done." if results.broken else ""
    return (
        f"{len(runs)} runs of {steps} steps, {told('precision')} on {told('device')}, threads a run: "
        f"{told('threads')}, torch {torch}; {seconds / 60:.0f} minutes of training in all.{failed}"
    )


def versions(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    return summary.get("versions") or {}


def picture(arms: Mapping[str, Group], title: str) -> str:
    rows = [(name, list(g.values(METRIC).values()), e) for name, g in arms.items() if (e := g.estimate(METRIC))]
    return intervals.drawn(rows, title=title, label="held-out loss, nats a token")


if __name__ == "__main__":
    main()
