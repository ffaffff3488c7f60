"""Ground floor of what others have written: files that nobody vouches for, refused by name before they cost anything.

A folder's files lie in that folder, a JSON file has a size and a depth that one of ours could have, and its values are
ones that JSON has.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lowrank.disk import read_bounded
from lowrank.errors import RefusedError

LARGEST = 64 * 2**20  # bytes of a JSON file: the plan of a model with 40,000 experts has a third of that
DEEPEST = 32  # containers in one another


def inside(folder: Path, name: str) -> Path:
    """Where the plain file ``name`` of a folder lies. Raises RefusedError where it is none, or leads out of the folder:
    a link may stay in it or, in a hub's cache (``snapshots/REVISION``), go to the blobs beside."""
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve()
        if not real.is_file():
            raise RefusedError(f"{path}: not a file.")
    except (OSError, RuntimeError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise RefusedError(f"{path}: {reason}.") from error
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if os.path.basename(name) != name or not (real.is_relative_to(home) or real.parent == blobs):
        raise RefusedError(f"{path}: leads out of its folder, to {real}.")
    return real


def read_json(folder: Path, name: str, most: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a file of a folder. Raises RefusedError naming the file."""
    real = inside(folder, name)
    try:
        return parse(read_bounded(real, most))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{folder / name}: cannot be read: {error}.") from error


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object that ``raw`` is. Raises ValueError where it is none, names something twice, nests too deeply, or
    has a number that is not finite or a text that is none."""
    try:
        found = json.loads(
            raw.decode(), object_pairs_hook=once, parse_constant=refuse_constant, parse_float=finite, parse_int=whole
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON (line {error.lineno}, column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from error
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    check_depth(found)
    return found


def check_depth(value: Any) -> None:
    """Level by level, so that no depth is too deep for it."""
    level: Sequence[Any] = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str) and not one.isascii():
                refuse_half_characters(one)
        if not below:
            return
        level = below
    raise ValueError("nested too deeply")


def refuse_half_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half a surrogate pair, which is not text") from error


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it names something twice")
    return found


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def finite(digits: str) -> float:
    found = float(digits)
    if not math.isfinite(found):
        raise ValueError(f"{digits[:20]} is beyond what a number can be")
    return found


def whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"{digits[:20]}… is beyond what a number can be")
    return int(digits)
