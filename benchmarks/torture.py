"""What a machine does to a run, done to it on purpose: lowrank beside PEFT + transformers' Trainer, by the same means.

    python benchmarks/torture.py                           # all of it: about half an hour on two cores
    python benchmarks/torture.py kill --points 200         # one part, fewer points of each arm
    python benchmarks/torture.py --write                   # … and the table into README.md

What is done, and what passing means, stands in README.md. Linux on x86-64 with a C compiler; ``--calls patched
--alone`` does without both, and without the peer.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

# Before torch is imported: one thread, so that a forked child computes, and nothing that is fetched.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the one above it

from benchmarks.ordeals import (  # noqa: E402
    drift,
    flips,
    fuzz,
    ground,
    kills,
    nonfinite,
    overrides,
    owners,
    parts,
    signals,
    sweep,
    table,
)
from benchmarks.ordeals.arm import Row  # noqa: E402
from benchmarks.ordeals.ground import Ground  # noqa: E402

SCRIPT = "benchmarks/torture.py"
Part = Callable[[Ground, int | None], Iterator[Row]]
# ``points`` is what --points says; each part has a number of its own where it says nothing.
PARTS: dict[str, Part] = {
    "kill": lambda place, points: kills.rows(place, ["kill"], points),
    "tear": lambda place, points: kills.rows(place, ["tear"], points),
    "full": lambda place, points: kills.rows(place, ["full"], points),
    "signals": lambda place, points: signals.rows(place, points or 64, min(points or 8, 8)),
    "parts": lambda place, points: parts.rows(place, points),
    "drift": lambda place, points: drift.rows(place, points),
    "flips": lambda place, points: flips.rows(place, points or 10_000),
    "nonfinite": lambda place, points: nonfinite.rows(place, points),
    "fuzz": lambda place, points: fuzz.rows(place, points or 100_000),
    "overrides": lambda place, points: overrides.rows(place, points or 100_000),
    "owners": lambda place, points: owners.rows(place, 8, points or 50),
    "sweep": lambda place, points: sweep.rows(place, points or 100),
    "optuna": lambda place, points: sweep.rows(place, points or 100, optuna=True),
}


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    chosen, started, rows = options.parts or [(name, None) for name in PARTS], time.monotonic(), []
    with TemporaryDirectory(prefix="torture-") as name:
        os.environ["LOWRANK_CACHE"] = str(Path(name) / "cache")
        native, peer = options.calls == "native", not options.alone
        place = ground.make(Path(name), peer=peer, native=native, at_once=options.jobs, seed=options.seed)
        for part, points in chosen:
            for row in PARTS[part](place, points or options.points):
                rows.append(row)
                print(table.line(row, time.monotonic() - started), file=sys.stderr, flush=True)
    found = table.markdown(rows, about(arguments, time.monotonic() - started))
    print(found)
    if options.write:
        table.write(options.write, found, rows)
    if any(row.ours is not None and row.ours.failures for row in rows):
        raise SystemExit(1)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="What a machine does to a run, done to it on purpose.")
    made.add_argument("parts", nargs="*", type=part, metavar="PART[=POINTS]", help=f"some of: {', '.join(PARTS)} (all)")
    made.add_argument("--points", type=int, help="points of each arm and part (every one, or what README.md says)")
    made.add_argument("--alone", action="store_true", help="lowrank alone, without PEFT + Trainer")
    made.add_argument("--calls", choices=["native", "patched"], default="native", help="how calls are counted (native)")
    made.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="points at once (one a core)")
    made.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    made.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=Path(__file__).parent,
        metavar="FOLDER",
        help="put the table into FOLDER/README.md, and torture.json beside it (benchmarks/)",
    )
    return made


def part(text: str) -> tuple[str, int | None]:
    """``kill`` or ``kill=20``."""
    name, _, points = text.partition("=")
    if name not in PARTS or not (points or "1").isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not allowed; one of {', '.join(PARTS)}, perhaps with =POINTS.")
    return name, int(points) if points else None


def about(arguments: list[str] | None, seconds: float) -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "peft", "accelerate", "safetensors")
    return {
        "command": shlex.join(["python", SCRIPT, *(sys.argv[1:] if arguments is None else arguments)]),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "machine": f"Linux {platform.release().split('-')[0]} {platform.machine()}, Python {platform.python_version()}",
        "minutes": f"{seconds / 60:.0f}",
    }


if __name__ == "__main__":
    main()
