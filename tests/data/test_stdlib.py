"""The standard library as data: what is taken, what is left, and that it is the same each time."""

from __future__ import annotations

import ast
import os
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import indent

import pytest

from lowrank.data import stdlib

MODULE = '''
import os

@decorated
def area(width, height):
    """Return the area of a rectangle
    given by its sides. More is said here.

    And here.
    """

    # multiply
    return width * height  # done

class Shape:
    async def draw(self, canvas):
        "Draw the shape on a canvas."
        await canvas.draw(self, self.colour)

    def undocumented(self):
        return self.nothing_to_say_about_this()

    def abstract(self):
        """Say that the body is nothing but this."""

    def terse(self, some, arguments):
        """Short."""
        return some + arguments + self.more

    def call(self, some, arguments):
        """call(some, arguments) is what a C function's docstring begins with."""
        return some + arguments

def one_line(argument): """Return the argument."""; return argument
'''


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def library() -> list[stdlib.Function]:
    started = time.process_time()
    found = stdlib.functions()
    assert time.process_time() - started < 15  # 1.4 s on a quiet machine
    return found


def test_a_function_is_taken_without_its_docstring_and_with_its_comments(tmp_path: Path) -> None:
    write(tmp_path, "shapes.py", MODULE)
    area, draw = stdlib.functions(tmp_path)
    assert area.source == ("def area(width, height):\n    # multiply\n    return width * height  # done")
    assert area.summary == "Return the area of a rectangle given by its sides."
    assert draw.source == ("async def draw(self, canvas):\n    await canvas.draw(self, self.colour)")
    assert draw.summary == "Draw the shape on a canvas."


def test_tests_and_what_distributions_leave_out_are_skipped(tmp_path: Path) -> None:
    for folder in ("test", "unittest/test", "idlelib/idle_test", "tkinter", "lib2to3/tests", "site-packages/pip"):
        write(tmp_path, f"{folder}/shapes.py", MODULE)
    assert stdlib.functions(tmp_path) == []


def test_exact_pairs_are_taken_once(tmp_path: Path) -> None:
    write(tmp_path, "a.py", MODULE)
    write(tmp_path, "b.py", MODULE)
    assert [function.module for function in stdlib.functions(tmp_path)] == ["a.py", "a.py"]


def test_the_order_does_not_depend_on_how_a_folder_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.py", "a/z.py", "a.py", "c/a.py"):
        write(tmp_path, name, MODULE.replace("canvas", name.replace("/", "_")[:-3] + "_canvas"))
    usual = stdlib.functions(tmp_path)
    walk = os.walk

    def reversed_walk(root: Path):
        for folder, folders, names in walk(root):
            folders.sort(reverse=True)
            yield folder, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert stdlib.functions(tmp_path) == usual
    assert len({function.module for function in usual}) == 4


def test_a_file_that_does_not_parse_or_decode_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "broken.py", "def broken(:\n")
    (tmp_path / "latin.py").write_bytes(b'def f():\n    "\xe9"\n')
    (tmp_path / "odd.py").write_bytes(b"# coding: no-such-codec\ndef f(): pass\n")
    write(tmp_path, "shapes.py", MODULE)
    assert len(stdlib.functions(tmp_path)) == 2


def test_lines_are_python_s_lines_whatever_else_breaks_a_line(tmp_path: Path) -> None:
    text = 'x = "\\\x0c\u2028\x85"\n\x0c\n' + MODULE
    write(tmp_path, "shapes.py", text)
    (tmp_path / "windows.py").write_bytes(text.replace("area", "region").replace("\n", "\r\n").encode())
    area, _, region = stdlib.functions(tmp_path)
    assert area.source.startswith("def area(")
    assert region.source == area.source.replace("area", "region")


def test_functions_are_found_wherever_they_stand_and_in_the_order_of_the_source(tmp_path: Path) -> None:
    function = MODULE.split("@decorated\n")[1].split("\nclass")[0]
    places = ("if x:", "else:", "try:", "except ValueError:", "else:", "finally:", "with x:", "for i in x:", "while x:")
    text = "".join(
        f"{place}\n{indent(function.replace('area', f'area{n}'), '    ')}\n" for n, place in enumerate(places)
    )
    text += f"match x:\n    case 1:\n{indent(function.replace('area', 'area9'), ' ' * 8)}\n"
    text += f"def outer():\n{indent(function.replace('area', 'area10'), '    ')}\n    return area10\n"
    write(tmp_path, "places.py", text)
    found = [function.source.partition("(")[0] for function in stdlib.functions(tmp_path)]
    assert found == [f"def area{n}" for n in range(11)]


def test_what_was_found_is_found_again_without_parsing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "lib", "shapes.py", MODULE)
    found = stdlib.functions(tmp_path / "lib", tmp_path / "cache")
    assert found == stdlib.functions(tmp_path / "lib")
    monkeypatch.setattr(ast, "parse", lambda content: pytest.fail("parsed again"))
    assert stdlib.functions(tmp_path / "lib", tmp_path / "cache") == found


def test_a_source_that_has_changed_is_parsed_again(tmp_path: Path) -> None:
    write(tmp_path / "lib", "shapes.py", MODULE)
    stdlib.functions(tmp_path / "lib", tmp_path / "cache")
    write(tmp_path / "lib", "shapes.py", MODULE.replace("area", "size"))
    [first, _] = stdlib.functions(tmp_path / "lib", tmp_path / "cache")
    assert first.source.startswith("def size")


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-9], lambda raw: raw.replace(b"canvas", b"carpet"), lambda raw: b""]
)
def test_a_kept_file_that_is_damaged_is_not_believed(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    write(tmp_path / "lib", "shapes.py", MODULE)
    found = stdlib.functions(tmp_path / "lib", tmp_path / "cache")
    [kept] = (tmp_path / "cache").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert stdlib.functions(tmp_path / "lib", tmp_path / "cache") == found


def test_a_cache_that_cannot_be_written_to_is_done_without(tmp_path: Path) -> None:
    write(tmp_path, "lib/shapes.py", MODULE)
    write(tmp_path, "cache", "a file")
    assert len(stdlib.functions(tmp_path / "lib", tmp_path / "cache")) == 2


def test_the_library_gives_thousands_of_pairs_that_parse(library: list[stdlib.Function]) -> None:
    assert len(library) > 3000
    assert len({(function.source, function.summary) for function in library}) == len(library)
    assert len({function.module for function in library}) > 200
    for function in library:
        assert isinstance(ast.parse(function.source).body[0], stdlib.Definition)
        assert ast.get_docstring(ast.parse(function.source).body[0]) is None
        assert "\n" not in function.summary
