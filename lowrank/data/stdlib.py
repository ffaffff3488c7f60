"""The Python standard library as data: every documented function and the first sentence of its docstring.

Nothing is downloaded: the sources lie beside the interpreter (PSF licence). What is found depends on the
version of Python, which is why its name carries it.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lowrank.disk import write_text

INSTRUCTION = "Write a one-line docstring for this Python function."

# Tests repeat each other and document little; the second line is generated or not the library's; the third
# is what some distributions of Python leave out, and without it they all give nearly the same pairs.
SKIPPED = frozenset(
    {"test", "tests", "idle_test", "turtledemo"}
    | {"__pycache__", "encodings", "pydoc_data", "site-packages", "dist-packages", "_vendor", "_bundled"}
    | {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter"}
)

SHORTEST_SOURCE = 40  # characters
SUMMARY_LENGTH = range(12, 161)  # characters
# About a token each for a tokenizer that knows code. The bound keeps whole examples under 256 tokens: a bound in
# characters would let through the arithmetic, which has nearly as many tokens as characters.
PIECE = re.compile(r"[A-Za-z]{1,6}|\d|[^\sA-Za-z\d]|\n+")
MOST_PIECES = 170

Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function of ``module`` (a path with '/'): source without docstring, first sentence of the docstring."""

    module: str
    source: str
    summary: str


def functions(root: Path | None = None, cache: Path | None = None) -> list[Function]:
    """Every documented function below ``root`` (default: this interpreter's library), without repeats.

    The order is that of the modules' paths and then of the source, whatever order a folder is listed in. What was
    found is kept in the folder ``cache`` under a hash of all that it was found in: parsing takes seconds.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    contents = {path.relative_to(root).as_posix(): path.read_bytes() for path in modules(root)}
    kept = cache / f"stdlib-{hash_of(contents)}.json" if cache is not None else None
    found = read(kept) if kept is not None else None
    if found is None:
        found = parsed(contents)
        if kept is not None:
            keep(kept, found)
    return found


def hash_of(contents: Mapping[str, bytes]) -> str:
    """Of all that decides what is found: the modules, this file, and the interpreter that parses."""
    hashed = hashlib.sha256(sys.version.encode() + Path(__file__).read_bytes())
    for module, content in contents.items():
        hashed.update(f"{module} {len(content)}\n".encode())
        hashed.update(content)
    return hashed.hexdigest()[:16]


def read(kept: Path) -> list[Function] | None:
    """What ``keep`` wrote; None where it is not there, or not whole."""
    try:
        sha256, _, rows = kept.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(rows).hexdigest().encode() != sha256:
        return None
    return [Function(*row) for row in json.loads(rows)]


def keep(kept: Path, found: Sequence[Function]) -> None:
    rows = json.dumps([(function.module, function.source, function.summary) for function in found])
    with suppress(OSError):  # a cache that cannot be written to
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, f"{hashlib.sha256(rows.encode()).hexdigest()}\n{rows}")


def parsed(contents: Mapping[str, bytes]) -> list[Function]:
    found: dict[tuple[str, str], Function] = {}
    for module, content in contents.items():
        for function in documented(module, content):
            found.setdefault((function.source, function.summary), function)
    return list(found.values())


def modules(root: Path) -> list[Path]:
    """The source files below ``root`` that are worth reading, in the order of their paths."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def documented(module: str, content: bytes) -> Iterator[Function]:
    """The functions and methods of one file that have a usable docstring; none if it does not parse."""
    if b"def " not in content:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
            tree = ast.parse(content)
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        lines = io.TextIOWrapper(io.BytesIO(content), encoding).read().split("\n")
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in sorted(definitions(tree), key=lambda node: (node.lineno, node.col_offset)):
        if docstring := ast.get_docstring(node):
            source, summary = without_docstring(node, lines), first_sentence(docstring)
            if usable(node, source, summary):
                yield Function(module, source, summary)


def definitions(tree: ast.Module) -> Iterator[Definition]:
    """All functions, wherever they stand: only in lists of statements, so that no expression need be walked."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        if isinstance(node, Definition):
            yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            below = getattr(node, name, None)
            if isinstance(below, list):  # an expression's body is none
                left += below


def without_docstring(node: Definition, lines: list[str]) -> str:
    """The lines of ``node``, comments kept, docstring cut out, dedented; empty if they share a line."""
    docstring = node.body[0]
    end = docstring.end_lineno or docstring.lineno
    head, tail = lines[node.lineno - 1 : docstring.lineno - 1], lines[end : node.end_lineno]
    alone = head and not lines[docstring.lineno - 1].encode()[: docstring.col_offset].strip()
    if not alone or lines[end - 1].encode()[docstring.end_col_offset :].strip():
        return ""
    while not head[-1].strip():
        head.pop()
    while tail and not tail[0].strip():
        tail.pop(0)
    margin = head[0][: node.col_offset]  # textwrap.dedent gives up where a string reaches further left
    return "\n".join(line.removeprefix(margin) for line in head + tail).rstrip()


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph on one line: summaries often wrap."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    line = " ".join(paragraph.split())
    return re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z`'\"(<])", line, maxsplit=1)[0]


def usable(node: Definition, source: str, summary: str) -> bool:
    """Long enough to say something, short enough to fit, and a sentence rather than a call or an example."""
    if len(node.body) < 2 or len(source) < SHORTEST_SOURCE or len(summary) not in SUMMARY_LENGTH:
        return False
    if len(PIECE.findall(source)) > MOST_PIECES:
        return False
    return not summary.startswith((f"{node.name}(", ">>>")) and "->" not in summary
