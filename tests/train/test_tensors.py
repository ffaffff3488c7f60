"""Our safetensors are safetensors: the library reads what we write bit for bit, and no header is taken at its word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank.disk import write
from lowrank.errors import RefusedError
from lowrank.keys import key
from lowrank.train.tensors import DTYPES, pieces, read

SHAPES = [(), (1,), (0,), (3, 0, 2), (5,), (3, 7), (2, 3, 4)]


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bit pattern, NaN and subnormal among them; of bool the two that it has."""
    count = dtype.itemsize * int(torch.tensor(shape).prod())
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (count,), dtype=torch.uint8, generator=key(0, seed))
    return raw.view(dtype).reshape(shape)


def bits(tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return (tensor.dtype, tuple(tensor.shape), flat.tolist())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(bits(one[name]) == bits(other[name]) for name in one)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_library_reads_every_dtype_and_shape_bit_for_bit_and_so_do_we(dtype: torch.dtype, tmp_path: Path) -> None:
    held = {f"t{n}": random_bits(dtype, shape, n) for n, shape in enumerate(SHAPES)}
    facts = write(tmp_path / "t.safetensors", pieces(held))
    assert facts.bytes == (tmp_path / "t.safetensors").stat().st_size
    assert same(load_file(tmp_path / "t.safetensors"), held)
    assert same(read(tmp_path / "t.safetensors"), held)
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_dtypes_mix_and_views_parameters_and_odd_names_are_saved_as_they_are(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    held = {
        "mask": torch.tensor([True, False, True]),
        "größe|step": torch.tensor(3),
        "a": table,
        "b": table.T,
        "c": table[1:, ::2],
        'quote"\n': torch.nn.Parameter(table.bfloat16()),
        "expanded": torch.ones(1, 2).expand(3, 2),
    }
    write(tmp_path / "t.safetensors", pieces(held))
    assert same(load_file(tmp_path / "t.safetensors"), held)
    assert same(read(tmp_path / "t.safetensors"), held)


@pytest.mark.parametrize("held", [{}, {"empty": torch.zeros(0)}, {"scalar": torch.tensor(1.5)}])
def test_a_file_may_hold_next_to_nothing(held: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path / "t.safetensors", pieces(held))
    assert same(load_file(tmp_path / "t.safetensors"), held)
    assert same(read(tmp_path / "t.safetensors"), held)


def test_what_the_library_writes_we_read(tmp_path: Path) -> None:
    held = {"a": torch.randn(3, 4), "b": torch.ones(5, dtype=torch.uint8), "c": torch.tensor(2.0).bfloat16()}
    save_file(held, tmp_path / "t.safetensors", metadata={"format": "pt", "other": "x"})
    assert same(read(tmp_path / "t.safetensors"), held)


def test_the_order_of_names_does_not_change_the_file(tmp_path: Path) -> None:
    held = {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.int8), "c": torch.ones(1).double()}
    one, other = pieces(held), pieces(dict(reversed(held.items())))
    assert b"".join(map(bytes, one)) == b"".join(map(bytes, other))


def test_no_second_copy_of_the_values_is_made() -> None:
    held = {"a": torch.zeros(1000)}
    _, values = pieces(held)
    held["a"][0] = 1.0
    assert bytes(values)[:4] == torch.tensor(1.0).numpy().tobytes()


def test_a_dtype_that_the_format_lacks_is_named() -> None:
    with pytest.raises(TypeError, match=r"x: safetensors has no torch\.complex128"):
        list(pieces({"x": torch.zeros(1, dtype=torch.complex128)}))


def forged(folder: Path, header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path = folder / "forged.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HUGE = 2**61
FORGED: dict[str, Any] = {
    "not JSON": b"{nonsense",
    "not an object": b"[1, 2]",
    "not UTF-8": b'{"\xff": 1}',
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "named twice": b'{"a": %b, "a": %b}' % ((json.dumps(one()).encode(),) * 2),
    "no tensor": {"a": 3},
    "a field more": {"a": {**one(), "code": "x"}},
    "unknown dtype": {"a": one(dtype="F128")},
    "dtype no text": {"a": one(dtype=["F32"])},
    "negative": {"a": one(shape=[-2], offsets=[0, 8])},
    "a fraction": {"a": one(shape=[2.0])},
    "true for one": {"a": one(shape=[True, 2])},
    "shape no list": {"a": one(shape="2")},
    "one offset": {"a": one(offsets=[8])},
    "larger than its bytes": {"a": one(shape=[3])},
    "enormous": {"a": one(shape=[HUGE], offsets=[0, 4 * HUGE])},
    "overflowing": {"a": one(shape=[2**40, 2**40], offsets=[0, 8])},
    "backwards": {"a": one(shape=[2], offsets=[8, 0])},
    "a gap": {"a": one(shape=[1], offsets=[4, 8])},
    "overlap": {"a": one(), "b": one()},
    "too little": {"a": one(shape=[1], offsets=[0, 4])},
    "beyond the end": {"a": one(shape=[4], offsets=[0, 16])},
}


@pytest.mark.parametrize("header", FORGED.values(), ids=FORGED)
def test_a_forged_header_is_refused_before_memory_is_taken(
    header: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = forged(tmp_path, header)

    def taken(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("memory was taken")

    monkeypatch.setattr(torch, "empty", taken)
    with pytest.raises(RefusedError, match=r"forged\.safetensors: cannot be read: "):
        read(path)


@pytest.mark.parametrize("length", [0, 1, 17, 2**40, 2**63, 2**64 - 1])
def test_a_headers_length_is_no_more_than_the_file_has(length: int, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="its header"):
        read(forged(tmp_path, {}, b"", length=length))


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "t.safetensors", pieces({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.uint8)}))
    whole = (tmp_path / "t.safetensors").read_bytes()
    for end in range(len(whole)):
        (tmp_path / "t.safetensors").write_bytes(whole[:end])
        with pytest.raises(RefusedError):
            read(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ({"a": (2, 2)}, r"a has shape \(2, 3\), not \(2, 2\)"),
        ({}, "'a' is not part of the plan"),
        ({"a": (2, 3), "b": (1,)}, "b is missing"),
    ],
)
def test_other_tensors_than_those_expected_are_refused(expected: Any, said: str, tmp_path: Path) -> None:
    write(tmp_path / "t.safetensors", pieces({"a": torch.ones(2, 3)}))
    assert same(read(tmp_path / "t.safetensors", {"a": (2, 3)}), {"a": torch.ones(2, 3)})
    with pytest.raises(RefusedError, match=said):
        read(tmp_path / "t.safetensors", expected)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "t.safetensors", pieces({"a": torch.ones(2)}))
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "t.safetensors")
    with pytest.raises(RefusedError, match="cannot be read"):
        read(tmp_path / "link.safetensors")
