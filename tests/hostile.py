"""Adapter folders as a stranger could have written them: keyed mutations of one that is sound."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank.errors import LowrankError

VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2, 3, 10**9, 2**62, 2**63 - 1, 10**30, 0.5, 1e308, "", "..", "x" * 500, "/etc/passwd"),
    *([], {}, [[]], [0], {"": 0}, "lowrank.adapters.Adapter", "lowrank.adapters.Bank", "os.system", "\udcff", "\0"),
]


def mutated_json(draw: random.Random, value: Any) -> Any:
    """The same tree with one value, key or item of it another."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        match draw.randrange(8):
            case 0:
                return {name: one for name, one in value.items() if name != key}
            case 1:
                return {**value, draw.choice(["more", key.upper(), ""]): draw.choice(VALUES)}
            case _:
                return {**value, key: mutated_json(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        if draw.randrange(8) == 0:
            return value[:at] + value[at + 1 :]
        if draw.randrange(8) == 0:
            return [*value, value[at]]
        return [*value[:at], mutated_json(draw, value[at]), *value[at + 1 :]]
    return draw.choice(VALUES)


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    """A bit flipped, a piece cut out, written over or doubled; mostly near the beginning, where headers are."""
    end = draw.choice([64, 2000, len(content)])
    at = draw.randrange(min(len(content), end) or 1)
    match draw.randrange(5):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        case 2:
            return content[:at] + draw.randbytes(draw.randrange(1, 9)) + content[at + 1 :]
        case 3:
            return content[:at] + content[at + draw.randrange(1, 50) :]
        case _:
            return content[:at] + content[max(0, at - draw.randrange(1, 50)) :]


def mutated_header(draw: random.Random, content: bytes) -> bytes:
    """Another JSON header of a safetensors file over the same values."""
    (length,) = struct.unpack("<Q", content[:8])
    found = mutated_json(draw, json.loads(content[8 : 8 + length]))
    text = json.dumps(found).encode()
    claimed = draw.choice([len(text)] * 6 + [0, 100 * 2**30, 2**64 - 1])
    return struct.pack("<Q", claimed) + text + content[8 + length :]


def fuzz(
    folder: Path, json_name: str, tensor_name: str, rounds: int, seed: int, load: Callable[[Path], None]
) -> set[str]:
    """Loads so many mutations of a folder's two files; how they ended, where nothing but our own errors was raised."""
    draw, outcomes = random.Random(seed), set[str]()
    plan, tensors = (folder / json_name).read_bytes(), (folder / tensor_name).read_bytes()
    for number in range(rounds):
        match draw.randrange(4):
            case 0:
                spoilt = json_name, mutated_bytes(draw, plan)
            case 1:
                spoilt = tensor_name, mutated_bytes(draw, tensors)
            case 2:
                spoilt = tensor_name, mutated_header(draw, tensors)
            case _:
                spoilt = json_name, json.dumps(mutated_json(draw, json.loads(plan))).encode()
        (folder / json_name).write_bytes(plan)
        (folder / tensor_name).write_bytes(tensors)
        (folder / spoilt[0]).write_bytes(spoilt[1])
        try:
            load(folder)
            outcomes.add("loaded")
        except LowrankError:
            outcomes.add("refused")
        except Exception as error:
            raise AssertionError(f"round {number} of seed {seed}: {spoilt[0]} {spoilt[1][:2000]!r}") from error
    (folder / json_name).write_bytes(plan)
    (folder / tensor_name).write_bytes(tensors)
    return outcomes
