"""Safetensors files piece by piece: written without a second copy in memory, read without trusting their header."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.disk import reading
from lowrank.errors import RefusedError

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes, of the format
Shapes = Mapping[str, tuple[int, ...]]


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The file's bytes: the header, then each tensor's values as they lie in memory. Raises TypeError for a dtype that
    the format does not have."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # each is then aligned
    yield header(ordered)
    for _, tensor in ordered:
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        yield bytes_of(flat.view(torch.uint8))


def header(ordered: list[tuple[str, Tensor]]) -> bytes:
    """Its length in eight bytes, and names, dtypes, shapes and places as JSON, padded to a multiple of eight."""
    found: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in NAMES:
            raise TypeError(f"{name}: safetensors has no {tensor.dtype}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        found[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class Entry:
    """A tensor as the header tells of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read(path: Path, shapes: Shapes | None = None) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. Raises RefusedError, before memory is taken for one, where the header does
    not describe this very file or, with ``shapes``, other tensors than those."""
    try:
        with reading(path) as file:
            entries = checked(file)
            if shapes is not None:
                refuse_others({entry.name: entry.shape for entry in entries}, shapes)
            return {entry.name: values(file, entry) for entry in entries}
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: cannot be read: {error}.") from error


def checked(file: BufferedReader) -> list[Entry]:
    """What the header says, in the order of the values, if these fill the rest of the file without gap or overlap."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, LARGEST_HEADER):
        raise ValueError("its header's length is not that of a header")
    try:
        found = json.loads(file.read(length), object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("its header is not a JSON object")
    entries = [entry(name, facts) for name, facts in found.items() if name != "__metadata__"]
    entries.sort(key=lambda one: (one.start, one.end))
    end = 0
    for one in entries:
        if one.start != end:
            raise ValueError(f"{reprlib.repr(one.name)} does not begin where the tensor before it ends")
        end = one.end
    if 8 + length + end != size:
        raise ValueError(f"its header describes {8 + length + end:,} bytes, and it has {size:,}")
    return entries


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names something twice")
    return found


def entry(name: str, facts: Any) -> Entry:
    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{reprlib.repr(name)} is not described as a tensor")
    dtype = DTYPES.get(facts["dtype"]) if isinstance(facts["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{reprlib.repr(name)} has dtype {reprlib.repr(facts['dtype'])}")
    shape, offsets = facts["shape"], facts["data_offsets"]
    if not counts(shape) or not counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{reprlib.repr(name)} has shape {reprlib.repr(shape)} at {reprlib.repr(offsets)}")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{reprlib.repr(name)} of shape {shape} and {dtype} does not fill bytes {offsets[0]} to {offsets[1]}"
        )
    return Entry(name, dtype, tuple(shape), *offsets)


def counts(value: Any) -> bool:
    """Whether it is a short list of whole numbers that a size can be."""
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**62 for n in value)


def refuse_others(found: Shapes, expected: Shapes) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise ValueError(f"{name} is missing")
        if name not in expected:
            raise ValueError(f"{reprlib.repr(name)} is not part of the plan")
        if found[name] != expected[name]:
            raise ValueError(f"{name} has shape {found[name]}, not {expected[name]}")


def values(file: BufferedReader, one: Entry) -> Tensor:
    """The next values of the file."""
    flat = torch.empty(one.end - one.start, dtype=torch.uint8)
    if file.readinto(bytes_of(flat)) != len(flat):
        raise ValueError("it has become shorter while it was read")
    return flat.view(one.dtype).reshape(one.shape)


def bytes_of(flat: Tensor) -> memoryview:
    """The memory of a row of bytes itself."""
    return memoryview(flat.numpy())  # type: ignore[arg-type]
