"""Configurations, rows of data and files that are random damage of good ones, read in process by the hundred thousand.

What may come of it is success or an error of ``lowrank.errors``: anything else would be a traceback for a user, and
so would be a reading that takes seconds or gigabytes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.ordeals import forks
from benchmarks.ordeals.arm import Figure, Row
from benchmarks.ordeals.ground import Ground
from benchmarks.ordeals.mutate import as_json, changed, damaged
from benchmarks.ordeals.parts import checkpoints
from lowrank import config, manifest
from lowrank.data import sources
from lowrank.errors import LowrankError
from lowrank.record.verify import verify

CHUNK = 500
MOST = 12 << 30  # bytes of address space: what a header claims must not be believed
SECONDS = 20  # of one reading
SHARES = {"configurations": 0.25, "rows of data": 0.5, "files": 0.25}
Fuzzed = Callable[[Random], None]


def rows(ground: Ground, count: int) -> Iterator[Row]:
    good = {"whole": ground.run("whole", ground.ours), "other": exported(ground)}
    found = []
    for kind, share in SHARES.items():
        number = round(count * share)
        chunks = [(start, min(CHUNK, number - start)) for start in range(0, number, CHUNK)]
        failures = [f for _, faults in ground.each(chunks, partial(chunk_of, ground, good, kind)) for f in faults]
        found.append(Figure(number, failures))
    whole = Figure(sum(f.total for f in found), [fault for figure in found for fault in figure.failures])
    parts = ", ".join(f"{figure.total:,} {kind}" for kind, figure in zip(SHARES, found, strict=True))
    yield Row(f"damaged at random ({parts}): read, or refused in a sentence", whole)


def exported(ground: Ground) -> Path:
    """An adapter in PEFT's format."""
    folder = ground.folder / "exported"

    def export() -> None:
        import lowrank

        lowrank.export_peft(lowrank.open(ground.folder / "whole-lowrank").model, folder)

    if not folder.exists():
        forks.value(export)
    return folder


def chunk_of(ground: Ground, good: dict[str, Path], kind: str, chunk: tuple[int, int]) -> list[str]:
    """The points of a chunk that end in anything else than success or a refusal."""
    start, count = chunk
    resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
    signal.signal(signal.SIGALRM, too_long)
    warnings.simplefilter("ignore")
    folder = ground.place(f"fuzz {kind} {start}")
    folder.mkdir()
    act = {"configurations": configurations, "rows of data": data_rows, "files": files}[kind](ground, good, folder)
    failures = []
    with open(os.devnull, "w") as null, redirect_stderr(null):
        for number in range(start, start + count):
            fault = fuzzed(act, Random(f"{ground.seed} {kind} {number}"))
            failures += [f"{kind} {number}: {fault}"] if fault else []
    shutil.rmtree(folder)
    return failures


def too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def fuzzed(act: Fuzzed, draw: Random) -> str:
    signal.alarm(SECONDS)
    try:
        act(draw)
    except LowrankError as error:
        return "" if str(error).strip() else "refused without a word"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"
    finally:
        signal.alarm(0)
    return ""


def configurations(ground: Ground, good: dict[str, Path], folder: Path) -> Fuzzed:
    whole = ground.ours.config().to_dict()

    def act(draw: Random) -> None:
        config.parse(changed(whole, draw))

    return act


def data_rows(ground: Ground, good: dict[str, Path], folder: Path) -> Fuzzed:
    jsonl = ground.ours.data.read_bytes()
    csv = b"instruction,input,output\n" + b"".join(b'"Say %d.",,"%d, or\n%d"\n' % (i, i, i) for i in range(20))
    settings = ground.ours.config().data
    rows = [{"instruction": "a", "input": None, "output": "b"}, {"instruction": "a", "input": "", "output": "b"}]

    def act(draw: Random) -> None:
        kind, content = draw.choice([("jsonl", jsonl), ("csv", csv)])
        if kind == "jsonl" and draw.random() < 0.5:
            content = b"\n".join(as_json(changed(row, draw)) for row in rows * 2) + b"\n"
        else:
            content = damaged(content, draw)
        path = folder / "fuzzed"
        path.write_bytes(content)
        policy, template = draw.choice(["error", "drop"]), draw.choice(["instruction", "plain"])
        sources.load(replace(settings, kind=kind, path=str(path), on_malformed=policy, template=template))

    return act


def files(ground: Ground, good: dict[str, Path], folder: Path) -> Fuzzed:
    """A file of an adapter, of a checkpoint that tells of it as its own, of a run directory, or of PEFT's adapter."""
    import lowrank
    from lowrank.train import checkpoint

    whole = good["whole"]
    bare = bare_model(ground)

    def with_model(load: Callable[[Any, Path], object]) -> Callable[[Path], None]:
        def act(path: Path) -> None:
            try:
                load(bare, path)
            finally:
                lowrank.remove(bare)

        return act

    acts: list[tuple[Path, Callable[[Path], object]]] = [
        (whole / "adapter", with_model(partial(lowrank.load_adapter, foreign=True))),
        (good["other"], with_model(lowrank.import_peft)),
        (checkpoints(whole)[0], checkpoint.read),
        (whole, reopened),
    ]

    def act(draw: Random) -> None:
        source, load = draw.choice(acts)
        copy = folder / source.name
        if copy.exists():
            shutil.rmtree(copy)
        shutil.copytree(source, copy)
        damage_one(copy, draw, sealed=source is not whole)
        load(copy)

    return act


def bare_model(ground: Ground) -> Any:
    from lowrank import assemble

    return assemble.load(assemble.parts(ground.ours.config())).model


def damage_one(folder: Path, draw: Random, *, sealed: bool) -> None:
    """One file; half of the time the manifest is that of the damaged file, so that more than its hash is read."""

    path = draw.choice([path for path in sorted(folder.iterdir()) if path.is_file() and path.stat().st_size])
    content = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.6:
        path.write_bytes(as_json(changed(json.loads(content), draw)))
    elif path.suffix == ".safetensors" and draw.random() < 0.4:
        length = int.from_bytes(content[:8], "little")
        header = as_json(changed(json.loads(content[8 : 8 + length]), draw))
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    else:
        path.write_bytes(damaged(content, draw))
    if sealed and path.name != manifest.MANIFEST and (folder / manifest.MANIFEST).exists() and draw.random() < 0.8:
        told = manifest.read_json(folder / manifest.MANIFEST)
        facts = manifest.written(path)
        told["files"][path.name] = {"bytes": facts.bytes, "sha256": facts.sha256}
        told.pop("sha256")
        (folder / manifest.MANIFEST).write_bytes(manifest.sealed(told))


def reopened(folder: Path) -> None:
    """What commands read of a run directory."""
    import lowrank

    run = lowrank.open(folder)
    _ = (run.summary, run.metrics, run.samples, run.recorded_plan, run.base)
    list(verify(folder))
