"""Each file of a checkpoint missing, or another than it was: named, and either not used or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.ordeals import forks
from benchmarks.ordeals.arm import Arm, Figure, Row, differing, spaced
from benchmarks.ordeals.ground import Ground
from lowrank import cli

Damage = Callable[[Path, Path], object]  # of a file, with the one of the checkpoint before


def link(path: Path, older: Path) -> None:
    path.unlink()
    path.symlink_to(older)


DAMAGES: dict[str, Damage] = {
    "missing": lambda path, older: path.unlink(),
    "emptied": lambda path, older: path.write_bytes(b""),
    "cut in half": lambda path, older: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte longer": lambda path, older: path.write_bytes(path.read_bytes() + b"\n"),
    "that of the checkpoint before": lambda path, older: shutil.copyfile(older, path),
    "a link to that of the checkpoint before": link,
}


@dataclass(frozen=True)
class Point:
    file: str
    damage: str
    alone: bool

    def __str__(self) -> str:
        return f"{self.file} {self.damage}{', in the only checkpoint' if self.alone else ''}"


def rows(ground: Ground, most: int | None = None) -> Iterator[Row]:
    title = "a part of a checkpoint missing or replaced: named, and an older one used or the resume refused"
    yield Row(title, *(damaged(ground, arm, most) for arm in ground.arms))


def checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [*folder.glob("checkpoints/step-*"), *folder.glob("checkpoint-*")]
    return sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))


def damaged(ground: Ground, arm: Arm, most: int | None) -> Figure:
    whole, stopped = arm.ended(ground.run("whole", arm)), ground.stopped(arm)
    newest, older, *_ = checkpoints(stopped)
    files = [path.name for path in sorted(newest.iterdir())]
    points = [Point(file, damage, alone) for alone in (False, True) for file in files for damage in DAMAGES]
    changing = [p for p in points if changes(newest / p.file, older / p.file, p.damage)]
    return ground.judged(spaced(changing, most), partial(judge, ground, arm, stopped, whole))


def changes(path: Path, older: Path, damage: str) -> bool:
    """The checkpoint before may have the very same file."""
    return "before" not in damage or path.read_bytes() != older.read_bytes()


def judge(ground: Ground, arm: Arm, stopped: Path, whole: dict[str, str], point: Point) -> str:
    folder = ground.copy(stopped, f"{arm.name[:4]}-{point.file}-{list(DAMAGES).index(point.damage)}-{point.alone}")
    newest, older, *rest = checkpoints(folder)
    DAMAGES[point.damage](newest / point.file, older / point.file)
    if point.alone and "link" not in point.damage:
        for path in (older, *rest):
            shutil.rmtree(path)
    if arm.name == "lowrank":
        fault = verified(folder, point.file) or gone_on(arm, folder, whole, point)
    else:
        again = forks.child(partial(arm.again, folder))
        named = again.code and point.file in again.output
        fault = "" if named or not differing(whole, arm.ended(folder)) else told(again.code, again.last)
    shutil.rmtree(folder)
    return fault


def told(code: int, last: str) -> str:
    return f"exit code {code}, another end, and nobody says which file: {last}"


def verified(folder: Path, file: str) -> str:
    """What is wrong with what ``lowrank verify`` says of it."""
    ended = forks.child(lambda: cli.main(["verify", str(folder)]))
    if ended.code != 6 or file not in ended.output:
        return f"lowrank verify exits with {ended.code}: {ended.last}"
    return ""


def gone_on(arm: Arm, folder: Path, whole: dict[str, str], point: Point) -> str:
    expected = arm.newest(folder)
    again = forks.child(partial(arm.again, folder))
    if point.file not in again.output:
        return f"not named: {again.output[-300:]}"
    if not expected:
        return "" if again.code == 6 and "Traceback" not in again.output else told(again.code, again.last)
    if again.code or differing(whole, arm.ended(folder)):
        return told(again.code, again.last)
    return arm.wrong(folder, again.output, expected)
