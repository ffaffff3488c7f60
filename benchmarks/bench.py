"""Speed and memory, every point a fresh process, arms in turn: the figures of README.md.

    python benchmarks/bench.py                        # all pieces on the CPU
    python benchmarks/bench.py peers saved            # some of them
    python benchmarks/bench.py --cuda 7b-peft         # on CUDA; --minutes 8 is the default there
    python benchmarks/bench.py --write                # … and renews results.json, plots/ and the tables of README.md
    python benchmarks/bench.py --list

A piece whose file of results is complete is not measured again (``--anew``); one that was broken off, or ran out of
``--minutes``, goes on with its next round.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a script's own folder is on the path, not the one above it

from benchmarks import pieces, processes, results, tables  # noqa: E402
from benchmarks.cuda import cuda  # noqa: E402
from benchmarks.pieces import CPU, TINY, Arm, Piece  # noqa: E402
from benchmarks.task import Task  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    with TemporaryDirectory(prefix="bench-") as folder:
        known = made(options, Path(folder))
        chosen = pick(known, options.pieces)
        if options.list:
            print(
                "\n".join(
                    f"{piece.name:<14} {len(piece.arms)} arms × {piece.rounds}: {piece.about}" for piece in chosen
                )
            )
            return
        command = shlex.join(["python", "benchmarks/bench.py", *(sys.argv[1:] if arguments is None else arguments)])
        about = {"command": command, **processes.conditions("cuda" if options.cuda else "cpu", options.threads)}
        deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
        for piece in chosen:
            measure(piece, options, about, Path(folder), deadline)
        found = gathered(known, options.results, results.read((options.write or HERE) / "results"))
    print(tables.told(found))
    if options.write:
        tables.write(options.write, found)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("pieces", nargs="*", help="by name (all)")
    made.add_argument("--cuda", action="store_true", help="the pieces of a CUDA device")
    made.add_argument("--list", action="store_true", help="the pieces, and nothing else")
    made.add_argument("--rounds", type=int, help="of each piece (its own: 5 of the table, 3 of curves)")
    made.add_argument("--minutes", type=float, help="begin no round after so many (no limit; 8 with --cuda)")
    made.add_argument("--threads", type=int, help="OMP_NUM_THREADS of all arms (as it is set here)")
    made.add_argument("--anew", action="store_true", help="measure what is measured already")
    made.add_argument("--tiny", action="store_true", help="on a model of seconds, to try the script")
    made.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER", help="where rows are kept")
    made.add_argument(
        "--write", type=Path, nargs="?", const=HERE, metavar="FOLDER", help="renew FOLDER's README.md and plots/"
    )
    return made


def made(options: argparse.Namespace, folder: Path) -> list[Piece]:
    if options.cuda and options.minutes is None:
        options.minutes = 8.0
    known = cuda(folder) if options.cuda else pieces.cpu(folder, TINY if options.tiny else CPU)
    return [replace(piece, rounds=min(piece.rounds, options.rounds or piece.rounds)) for piece in known]


def pick(known: Sequence[Piece], names: Iterable[str]) -> list[Piece]:
    by_name = {piece.name: piece for piece in known}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise SystemExit(f"{unknown[0]}: no such piece; {', '.join(by_name)}")
    return [by_name[name] for name in names] or list(known)


def measure(
    piece: Piece, options: argparse.Namespace, about: dict[str, Any], folder: Path, deadline: float | None
) -> None:
    """The rounds that are missing, as long as there is time."""
    file = results.File(options.results / f"{piece.name}.jsonl")
    if options.anew:
        file.path.unlink(missing_ok=True)
    env = processes.environment(options.threads)
    for number in range(file.begin(about) + 1, piece.rounds + 1):
        if deadline is not None and time.monotonic() > deadline:
            print(f"{piece.name}: out of time before round {number} of {piece.rounds}; run it again", file=sys.stderr)
            return
        rows = one_round(piece, number, folder, env)
        results.refuse_different_work(piece, rows)
        file.append([strip(row, piece) for row in rows])


def one_round(piece: Piece, number: int, folder: Path, env: dict[str, str]) -> list[dict[str, Any]]:
    """Every arm once: there and, in the next round, back, so that what slows the machine slows all of them."""
    rows = []
    for arm in piece.arms if number % 2 else reversed(piece.arms):
        started = time.monotonic()
        place = ready(arm, folder, env)
        done = processes.run(arm.module, place, *arm.arguments, env=env)
        row = {"failed": done.failed} if done.failed else results.figures(done.output, arm.task.warmup)
        rows.append({"arm": arm.name, "round": number, "others": round(done.others, 3), **row})
        rows[-1] |= {"precision": arm.task.precision, "took": round(time.monotonic() - started, 1)}
        print(f"{piece.name} {number}/{piece.rounds} {arm.name}: {line(rows[-1])}", file=sys.stderr, flush=True)
    return rows


def ready(arm: Arm, folder: Path, env: dict[str, str]) -> Path:
    """The folder of an arm's task, made once; with what the peers read where the arm is one."""
    place = folder / key(arm.task)
    if not place.is_dir():
        place.mkdir()
        arm.task.write(place)
    if arm.module in pieces.PREPARED and not (place / "examples.json").is_file():
        done = processes.run("benchmarks.task", place, env=env)
        if done.failed:
            raise SystemExit(f"benchmarks.task: {done.failed}")
    return place


def key(task: Task) -> str:
    return f"task-{abs(hash(task)):x}"


def strip(row: dict[str, Any], piece: Piece) -> dict[str, Any]:
    """A row for the file: losses only where they are what is compared."""
    dropped = ("lrs", "hashes") if piece.losses else ("lrs", "hashes", "losses")
    return {name: value for name, value in row.items() if name not in dropped}


def line(row: dict[str, Any]) -> str:
    """A row in a few words."""
    if row.get("failed"):
        return str(row["failed"])
    numbers = [f"{name} {row[name]:,.4g}" for name in (*results.DRAWN, *results.RATES) if name in row]
    return f"{', '.join(dict.fromkeys(numbers))}; others {row['others']:.0%}, {row['took']:.0f} s"


def gathered(known: Sequence[Piece], folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    """What ``results.json`` had, renewed by every piece that has all its rounds."""
    found = dict(before)
    for piece in known:
        file = results.File(folder / f"{piece.name}.jsonl")
        if file.path.is_file() and file.rounds >= piece.rounds:
            found[piece.name] = results.summary(piece, file)
    return found


if __name__ == "__main__":
    main()
