"""The planted bugs still apply, the runner tells a caught one from one that survives, and all of them are caught."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from mutant import Mutant
from planted import MUTANTS
from run import ROOT, check, main

PARTS = {  # a package of one function, and its test
    "lowrank/__init__.py": "",
    "lowrank/sums.py": "def mean(numbers):\n    return sum(numbers) / len(numbers)\n",
    "tests/test_sums.py": "from lowrank.sums import mean\n\n\n"
    "def test_a_mean():\n    assert mean([1, 2, 6]) == 3\n\n\ndef test_of_equals():\n    assert mean([4, 4]) == 4\n",
    "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["slow: slow", "cuda: cuda"]\n',
}


def bug(after: str, *tests: str, before: str = "sum(numbers) / len(numbers)") -> Mutant:
    return Mutant(after, "lowrank/sums.py", before, after, tests or ("test_sums.py",))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in PARTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_bug_can_be_planted_and_the_tests_that_catch_it_are_there(mutant: Mutant) -> None:
    mutant.planted((ROOT / mutant.file).read_text(encoding="utf-8"))
    assert mutant.tests
    for node in mutant.tests:
        file, _, name = node.partition("::")
        assert not name or name.partition("[")[0] in functions(ROOT / "tests" / file)


def test_there_are_dozens_and_each_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 34


@pytest.mark.parametrize(
    ("mutant", "why"),
    [
        (bug("sum(numbers)", before="sum(numbers) / 3"), "0 times"),
        (bug("max", before="numbers"), "3 times"),
        (bug("sum(numbers) / len( numbers )"), "nothing changes"),
    ],
    ids=["not there", "not once", "no change"],
)
def test_what_cannot_be_planted_is_said(mutant: Mutant, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        mutant.planted(PARTS["lowrank/sums.py"])


def test_the_table_tells_what_was_caught_by_which_test(tree: Path) -> None:
    said: list[str] = []
    assert check(tree, [bug("sum(numbers) / 2"), bug("max(numbers) / 2")], 2, said.append)
    assert said[-1] == "2/2 caught"
    assert said[1].startswith("sum(numbers) / 2 ")
    assert said[1].endswith("test_sums.py::test_a_mean")
    assert said[2].endswith("test_sums.py::test_of_equals")  # 6 / 2 is the right mean
    assert {name: (tree / name).read_text() for name in PARTS} == PARTS  # it was a copy that had them


def test_what_no_test_notices_survives_and_so_does_what_keeps_the_tests_from_running(tree: Path) -> None:
    bugs = [bug("sum(numbers) // len(numbers)"), bug("sum(numbers) / len(numbers)\n\n\nraise ImportError")]
    said: list[str] = []
    assert not check(tree, bugs, say=said.append)
    assert said[1].endswith("SURVIVED")
    assert said[2].endswith("SURVIVED: its tests did not run")
    assert said[3] == f"0/2 caught; not: {bugs[0].name}, {bugs[1].name}"


def test_tests_that_fail_without_a_bug_catch_nothing(tree: Path) -> None:
    (tree / "lowrank" / "sums.py").write_text("def mean(numbers):\n    return 3\n\n\n# sum(numbers) / len(numbers)\n")
    said: list[str] = []
    assert not check(tree, [bug("0", before="3")], say=said.append)
    assert said[-1] == "the tests do not pass without a bug"


@pytest.mark.slow
def test_every_bug_is_caught_by_the_fast_tests_of_its_part(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["-j", "2"]) == 0
    table = capfd.readouterr().out
    sys.stdout.write(table)
    assert table.endswith(f"{len(MUTANTS)}/{len(MUTANTS)} caught\n")
