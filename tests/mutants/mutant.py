"""A silent bug: a small change of one file that crashes nothing and makes a number, or a promise, wrong."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Mutant:
    """``before``, which stands once in ``file``, becomes ``after``; one of ``tests`` (node ids below tests/) fails."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The file's text with the bug. Raises ValueError unless ``before`` is there once and the change is one."""
        found = text.count(self.before)
        if found != 1:
            raise ValueError(f"{self.name}: its text is {found} times in {self.file}, not once")
        changed = text.replace(self.before, self.after)
        if meaning(self.file, changed) == meaning(self.file, text):
            raise ValueError(f"{self.name}: nothing changes in what {self.file} means")
        return changed

    def nodes(self) -> list[str]:
        return [f"tests/{test}" for test in self.tests]


def meaning(file: str, text: str) -> str:
    """What is left of a file when comments and layout do not count. Raises SyntaxError, or YAMLError, for no file."""
    if Path(file).suffix == ".yaml":
        return repr(yaml.safe_load(text))
    return ast.dump(ast.parse(text))
