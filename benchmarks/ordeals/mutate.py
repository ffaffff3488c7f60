"""Random damage to bytes and to trees of plain values, all of it keyed: the same generator gives the same damage."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -0.0, 1, -1, 3, 2**31, 2**63, -(2**64), 10**40, 0.5, 1e-320, 1e308, -1e308, math.inf),
    *(-math.inf, math.nan, "", " ", "0", "1e3", "nan", ".inf", "true", "null", "???", "${loop.seed}", "${nowhere}"),
    *("${oc.env:HOME}", "a" * 300, "ü🙂", "\x00", "\ud800", "../../etc/passwd", "/dev/zero", "%s{0}", "*", "[", "(?P<"),
    *("lowrank.adapters.LoRA", "os.system", "torch.optim.SGD", "auto", "jsonl", "cuda:99", "meta", "cpu", "fp64"),
    *([], [None], [[]], [1, "a", None], ["q_proj", "q_proj"], {}, {"a": 1}, {"_target_": "os.system"}, {"": {}}),
    *({"*.q_proj": {"r": -1}}, {"*": {"_target_": "lowrank.adapters.DoRA"}}, [{"match": "*", "lr": -1}]),
)
PIECES: tuple[bytes, ...] = (
    *(b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b'"', b"'", b"\\", b"\\u", b"\\ud800", b"{"),
    *(b"}", b"[", b"]", b",", b":", b"[" * 2000, b'{"a":' * 500, b"NaN", b"Infinity", b"1e999", b"-", b"null"),
    *(b"true", b"9" * 5000, b"\xc3", b"\xf0\x9f\x99\x82", "ü".encode("latin-1"), b"\x1f\x8b", b"PK\x03\x04", b"/../"),
    *(b'"instruction"', b'"output": 3', b',"output":null', b"\x00" * 64, b"\xff" * 8, b"a" * 100_000, b";", b"\t"),
)


def damaged(content: bytes, draw: Random) -> bytes:
    """One to three kinds of damage."""
    for _ in range(draw.randint(1, 3)):
        content = draw.choice(DAMAGES)(content, draw)
    return content


def flipped(content: bytes, draw: Random) -> bytes:
    found = bytearray(content)
    for _ in range(draw.randint(1, 8) if found else 0):
        found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


def cut(content: bytes, draw: Random) -> bytes:
    return content[: draw.randint(0, len(content))]


def without_a_span(content: bytes, draw: Random) -> bytes:
    start, length = span(content, draw)
    return content[:start] + content[start + length :]


def with_a_span_twice(content: bytes, draw: Random) -> bytes:
    start, length = span(content, draw)
    return content[: start + length] + content[start:]


def with_a_piece(content: bytes, draw: Random) -> bytes:
    start, _ = span(content, draw)
    return content[:start] + draw.choice(PIECES) + content[start:]


def with_random_bytes(content: bytes, draw: Random) -> bytes:
    start, length = span(content, draw)
    return content[:start] + draw.randbytes(length) + content[start + length :]


def with_another_number(content: bytes, draw: Random) -> bytes:
    """Eight bytes as a length or an offset would have them."""
    start = draw.choice([0, draw.randint(0, max(0, len(content) - 8))])
    number = draw.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(content), draw.randrange(2**20)])
    return content[:start] + number.to_bytes(8, "little") + content[start + 8 :]


def span(content: bytes, draw: Random) -> tuple[int, int]:
    return draw.randint(0, len(content)), draw.choice([1, 2, 8, 64, 512])


DAMAGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(flipped, cut, without_a_span, with_a_span_twice, with_a_piece, with_random_bytes, with_another_number),
)


def changed(tree: dict[str, Any], draw: Random) -> dict[str, Any]:
    """A copy of a tree with one to three of its branches replaced, dropped, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        parent, name = draw.choice([*branches(tree)] or [(tree, "")])
        match draw.randrange(6):
            case 0:
                parent.pop(name) if isinstance(parent, list) else parent.pop(name, None)
            case 1 if isinstance(parent, dict):
                parent[misspelt(str(name), draw)] = parent.pop(name, None)
            case 2 if isinstance(parent, dict):
                parent[draw.choice(["more", "", "_target_", "kind", "ü", "a.b", str(name) + "x"])] = value(draw)
            case _:
                parent[name] = value(draw)
    return tree


def branches(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of all that lies in a tree, containers included."""
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    return [(node, name) for name, _ in items] + [found for _, below in items for found in branches(below)]


def misspelt(name: str, draw: Random) -> str:
    if not name:
        return "x"
    at = draw.randrange(len(name))
    before, after = name[:at], name[at + 1 :]
    return draw.choice([before + after, before + name[at] * 2 + after, name.upper(), name + " "])


def value(draw: Random) -> Any:
    if draw.random() < 0.2:
        return draw.choice([draw.randint(-5, 50), draw.uniform(-2, 2), 10.0 ** draw.randint(-12, 12)])
    return copy.deepcopy(draw.choice(VALUES))


def as_json(tree: Any) -> bytes:
    """As a careless program writes it: half characters and NaN included."""
    return json.dumps(tree, ensure_ascii=True).encode()
