"""Plants the silent bugs one by one in a copy of the tree: each must be caught by the fast tests that it names.

    python tests/mutants/run.py                 all of them
    python tests/mutants/run.py NAME… -j 2      some, in two processes

The named tests must pass without a bug. A bug is caught where one of them then fails: not where they cannot be
collected, find nothing to run, or never end. Exits 1 where one survives.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutant import Mutant
from planted import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
TREE = ("lowrank", "conf", "hydra_plugins", "benchmarks", "docs", "tests", "train.py", "pyproject.toml", "README.md")
LIMIT = 600  # seconds for the tests of one bug
FAILED = re.compile(r"^(?:FAILED|ERROR) tests/([^\[\s]+)", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """``caught`` is the test that failed; empty where the bug survived, and ``how`` then says how."""

    mutant: Mutant
    caught: str
    how: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.mutant.name:<70} {self.mutant.file:<37} {self.seconds:6.1f} s  {self.caught or self.how}"


@dataclass(frozen=True)
class Tests:
    code: int
    output: str
    seconds: float


def copied(root: Path, folder: Path) -> Path:
    """What the tests need of the tree, in ``folder``."""
    left_out = shutil.ignore_patterns("__pycache__", ".*", "outputs")
    for name in TREE:
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=left_out)
        elif (root / name).exists():
            shutil.copy(root / name, folder / name)
    return folder


def environment(tree: Path) -> dict[str, str]:
    """The copy's own lowrank comes first: an installed one would be the tree's own, without a bug."""
    path = os.pathsep.join(part for part in (str(tree), os.environ.get("PYTHONPATH", "")) if part)
    alone = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **alone, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def refuse_other_tree(tree: Path) -> None:
    """Raises RuntimeError where the tests would import another lowrank than the copy's."""
    code = "import lowrank; print(lowrank.__file__)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=True).stdout
    if Path(found.strip()) != tree / "lowrank" / "__init__.py":
        raise RuntimeError(f"the tests would run on {found.strip()}, not on the copy in {tree}")


def pytest(tree: Path, nodes: Sequence[str]) -> Tests:
    """Those of the nodes that are fast, until the first fails."""
    options = ("-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not cuda", "--tb=line", "-rfE")
    command = [sys.executable, "-m", "pytest", *options, *nodes]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment(tree), capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return Tests(-1, "", time.perf_counter() - started)
    return Tests(done.returncode, done.stdout + done.stderr, time.perf_counter() - started)


def tried(mutant: Mutant, tree: Path) -> Outcome:
    """The bug planted, its tests run, the file put back."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(mutant.planted(text), encoding="utf-8")
    try:
        tests = pytest(tree, mutant.nodes())
    finally:
        path.write_text(text, encoding="utf-8")
    failed = FAILED.search(tests.output)
    caught = failed[1] if failed and tests.code == 1 else ""
    how = {0: "SURVIVED", -1: f"SURVIVED: no end in {LIMIT} s"}.get(tests.code, "SURVIVED: its tests did not run")
    return Outcome(mutant, caught, how, tests.seconds)


def every(mutants: Sequence[Mutant], trees: Sequence[Path]) -> Iterator[Outcome]:
    """In their order; as many at a time as there are copies of the tree."""
    free: queue.Queue[Path] = queue.Queue()
    for tree in trees:
        free.put(tree)

    def one(mutant: Mutant) -> Outcome:
        tree = free.get()
        try:
            return tried(mutant, tree)
        finally:
            free.put(tree)

    with ThreadPoolExecutor(len(trees)) as pool:
        yield from pool.map(one, mutants)


def check(root: Path, mutants: Sequence[Mutant], processes: int = 1, say: Callable[[str], None] = print) -> bool:
    """Whether each bug is caught by tests that pass without it; ``say`` gets the table, line by line."""
    with tempfile.TemporaryDirectory(prefix="lowrank-mutants-") as temporary:
        trees = []
        for number in range(processes):
            (Path(temporary).resolve() / str(number)).mkdir()
            trees.append(copied(root, Path(temporary).resolve() / str(number)))
        refuse_other_tree(trees[0])
        clean = pytest(trees[0], sorted({node for mutant in mutants for node in mutant.nodes()}))
        if clean.code:
            say(clean.output)
            say("the tests do not pass without a bug")
            return False
        say(f"{'without a bug':<108} {clean.seconds:6.1f} s  every test passes")
        survived = []
        for outcome in every(mutants, trees):
            say(str(outcome))
            survived += [] if outcome.caught else [outcome.mutant.name]
    say(f"{len(mutants) - len(survived)}/{len(mutants)} caught" + (f"; not: {', '.join(survived)}" if survived else ""))
    return not survived


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of bugs, or a part of names; all where none is given")
    parser.add_argument("-j", type=int, default=1, metavar="N", help="processes")
    given = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not given.names or any(name in m.name for name in given.names)]
    if not chosen:
        parser.error(f"no bug is called {', '.join(given.names)}")
    return 0 if check(ROOT, chosen, given.j, lambda line: print(line, flush=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
