"""PEFT + transformers' Trainer against lowrank: one model, one set of examples in one order, each arm a fresh process.

    python benchmarks/vs_peft.py --pairs 5            # prints the table
    python benchmarks/vs_peft.py --pairs 5 --write    # … and puts it into README.md, beside it .json and .svg

What is measured, and how, stands in README.md. Linux only: memory and load are read from /proc.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the one above it

from benchmarks import arm, processes, table  # noqa: E402
from benchmarks.arm import Result  # noqa: E402
from benchmarks.processes import environment, machine  # noqa: E402
from benchmarks.task import Task  # noqa: E402

SCRIPT = "benchmarks/vs_peft.py"
PEER, OURS = "benchmarks.peer", "benchmarks.ours"
SAME = 1e-3  # losses further apart than this are not of the same training


@dataclass(frozen=True)
class Pair:
    peer: Result
    ours: Result
    others: float  # share of the machine's time that went to anything else meanwhile; the worse of the two


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    task = Task(options.model, options.data, options.warmup + options.steps, options.warmup, options.micro_batch)
    pairs = measure(task, options.pairs, environment(options.threads))
    about = {**asdict(task), "command": command(sys.argv[1:] if arguments is None else arguments), **machine()}
    found = table.markdown(pairs, task.warmup, about)
    print(found)
    if options.write:
        table.write(options.write, found, pairs, about)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="PEFT + transformers' Trainer against lowrank, on the CPU.")
    made.add_argument("--pairs", type=positive, default=5, help="runs of each arm, alternating (5)")
    made.add_argument("--steps", type=positive, default=12, help="timed optimizer steps of a run (12)")
    made.add_argument("--warmup", type=positive, default=2, help="steps before those, not timed (2)")
    made.add_argument("--micro-batch", type=positive, default=8, help="examples a step (8)")
    made.add_argument("--model", default="smollm2", help="smollm2, tiny_llama, a folder or a hub name (smollm2)")
    made.add_argument("--data", default="stdlib", help="stdlib, or a .jsonl of instruction, input, response (stdlib)")
    made.add_argument("--threads", type=positive, help="OMP_NUM_THREADS of both arms (as it is set here)")
    made.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=Path(__file__).parent,
        metavar="FOLDER",
        help="put the table into FOLDER/README.md, and vs_peft.json and .svg beside it (benchmarks/)",
    )
    return made


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; a positive integer.")
    return number


def command(arguments: list[str]) -> str:
    """What a reader types to measure the same."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return shlex.join([*([f"OMP_NUM_THREADS={threads}"] if threads else []), "python", SCRIPT, *arguments])


def measure(task: Task, count: int, env: dict[str, str]) -> list[Pair]:
    """Alternating runs, peer first. SystemExit where an arm fails or the two did not do the same work."""
    pairs = []
    with TemporaryDirectory(prefix="vs-peft-") as folder:
        task.write(Path(folder))
        result("benchmarks.task", folder, env)
        for number in range(1, count + 1):
            theirs, mine = result(PEER, folder, env), result(OURS, folder, env)
            peer, ours = arm.read(theirs.output), arm.read(mine.output)
            refuse_different_work(peer, ours)
            pairs.append(Pair(peer, ours, max(theirs.others, mine.others)))
            print(f"pair {number} of {count}: {table.line(pairs[-1], task.warmup)}", file=sys.stderr, flush=True)
    return pairs


def result(module: str, folder: str, env: dict[str, str]) -> processes.Done:
    done = processes.run(module, Path(folder), env=env)
    if done.failed:
        raise SystemExit(f"{module}: {done.failed}")
    return done


def refuse_different_work(peer: Result, ours: Result) -> None:
    """A speed is comparable only between arms that trained the same: tokens, learning rates, losses."""
    unlike = [what for what in ("token_hashes", "trainable_parameters", "threads") if differs(what, peer, ours)]
    if any(abs(a - b) > 1e-12 for a, b in zip(peer.lrs, ours.lrs, strict=True)):
        unlike.append("lrs")
    if not all(abs(a - b) <= SAME for a, b in zip(peer.losses, ours.losses, strict=True)):  # nan is not close
        unlike.append("losses")
    if unlike:
        raise SystemExit(f"the arms did not do the same work: {', '.join(unlike)} differ\n{peer}\n{ours}")


def differs(what: str, peer: Result, ours: Result) -> bool:
    return bool(getattr(peer, what) != getattr(ours, what))


if __name__ == "__main__":
    main()
