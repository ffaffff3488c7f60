"""One bit flipped anywhere in a checkpoint: found, or read as if nothing were."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.ordeals import forks
from benchmarks.ordeals.arm import Figure, Row
from benchmarks.ordeals.ground import Ground
from benchmarks.ordeals.parts import checkpoints
from lowrank import cli, manifest

CHUNK = 250  # flips in one child
READ_BY_TRAINER = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
FOUND, HARMLESS, SILENT = "found", "harmless", "silent"
Flip = tuple[str, int]  # a file, and a bit of it


def rows(ground: Ground, count: int) -> Iterator[Row]:
    """Half of the flips are spread evenly over the bits, half over the files: small files are hit as well."""
    ours = ground.run("whole", ground.ours)
    folders = [checkpoints(ours)[0], ours / "adapter"]
    found = [flipped(ground, folder, count // len(folders), found_by_manifest) for folder in folders]
    peer = None
    if ground.peer is not None:
        peer = flipped(ground, checkpoints(ground.run("whole", ground.peer))[0], count, theirs, READ_BY_TRAINER)
    both = Figure(sum(one.total for one in found), [fault for one in found for fault in one.failures])
    yield Row("a bit flipped in a checkpoint or the final adapter: found", both, peer)
    commands = drawn(folders[0], max(1, count // 500), ground.seed + 1)
    yield Row(
        "… by the command: lowrank verify exits with 6",
        ground.judged(commands, partial(by_command, ground, ours, folders[0].relative_to(ours))),
    )


def drawn(folder: Path, count: int, seed: int, names: tuple[str, ...] = ()) -> list[Flip]:
    draw = random.Random(seed)
    sizes = {path.name: 8 * path.stat().st_size for path in sorted(folder.iterdir()) if path.stat().st_size}
    sizes = {name: size for name, size in sizes.items() if name in (names or sizes)}
    by_size = draw.choices(list(sizes), weights=list(sizes.values()), k=count - count // 2)
    chosen = [*by_size, *draw.choices(list(sizes), k=count // 2)]
    return [(name, draw.randrange(sizes[name])) for name in chosen]


def flipped(ground: Ground, folder: Path, count: int, find: Any, names: tuple[str, ...] = ()) -> Figure:
    flips = drawn(folder, count, ground.seed, names)
    chunks = [(start, flips[start : start + CHUNK]) for start in range(0, count, CHUNK)]
    failures = []
    for _, silent in ground.each(chunks, lambda chunk: chunk_of(ground, folder, chunk, find)):
        failures += [f"bit {bit} of {folder.name}/{name} is read as if nothing were" for name, bit in silent]
    return Figure(count, failures)


def chunk_of(ground: Ground, folder: Path, chunk: tuple[int, list[Flip]], find: Any) -> list[Flip]:
    """The flips of a chunk that are not found."""
    start, flips = chunk
    parent = ground.place(f"flips-{folder.name}-{start}")
    copy, _ = (shutil.copytree(folder, parent / name) for name in (folder.name, "good"))
    if any(find(copy, name) is FOUND for name in {name for name, _ in flips}):
        raise SystemExit(f"{folder}: something is found before anything is flipped")
    silent = []
    for name, bit in flips:
        with flip(copy / name, bit):
            if find(copy, name) is SILENT:
                silent.append((name, bit))
    return silent


@contextmanager
def flip(path: Path, bit: int) -> Iterator[None]:
    good = path.read_bytes()
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bad)
    try:
        yield
    finally:
        path.write_bytes(good)


def found_by_manifest(copy: Path, name: str) -> str:
    return SILENT if manifest.verify(copy) is None else FOUND


def theirs(copy: Path, name: str) -> str:
    """Whether reading the file as the Trainer does fails; what reads the same as before was a bit that says nothing."""
    try:
        found = read(copy / name)
    except Exception:
        return FOUND
    return HARMLESS if found == known(copy.parent / "good" / name) else SILENT


@cache
def known(path: Path) -> str:
    return read(path)


def read(path: Path) -> str:
    """All that the Trainer takes from a file on resume."""
    import torch
    from safetensors.torch import load_file
    from transformers.trainer_callback import TrainerState

    if path.suffix == ".json":
        return repr(TrainerState.load_from_json(str(path)))
    found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=path.suffix == ".pt")
    return repr(plain(found))


def plain(value: Any) -> Any:
    """Tensors and arrays by their bytes, all of them."""
    if isinstance(value, dict):
        return {repr(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "detach"):
        value = value.detach().numpy()
    return value.tobytes() if hasattr(value, "tobytes") else value


def by_command(ground: Ground, ours: Path, checkpoint: Path, point: Flip) -> str:
    name, bit = point
    folder = ground.copy(ours, f"verify-{name}-{bit}")
    with flip(folder / checkpoint / name, bit):
        ended = forks.child(lambda: cli.main(["verify", str(folder)]))
    return "" if ended.code == 6 and name in ended.output else f"exit code {ended.code}: {ended.last}"
