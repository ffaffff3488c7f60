"""Death at every change of the disk inside a save, half a write that reaches the file, and a disk that is full.

Points are counted calls, not times: a run is first counted, then begun anew for each of them, interfered with there,
and gone on with as a user would. It must end in the same bits as one that nothing disturbed.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.ordeals import forks
from benchmarks.ordeals.arm import Arm, Figure, Place, Row, differing, spaced
from benchmarks.ordeals.calls import COUNT, FULL, KILL, TEAR
from benchmarks.ordeals.forks import Ended
from benchmarks.ordeals.ground import Ground, inside

MISSED = "missed"  # the call did not come: not a point
KINDS = {"kill": KILL, "tear": TEAR, "full": FULL}
TITLES = {
    KILL: "SIGKILL at a change of the disk: resumed, ends in the same bits",
    TEAR: "half of a write, then death: resumed, ends in the same bits",
    FULL: "disk full from a write on: said, and resumed, ends in the same bits",
}


@dataclass(frozen=True)
class Point:
    arm: str
    place: str
    what: int
    number: int

    def __str__(self) -> str:
        what = {KILL: "killed before change", TEAR: "torn at write", FULL: "full from write"}[self.what]
        return f"{what} {self.number} of {self.place}"


def rows(ground: Ground, kinds: list[str], most: int | None = None) -> Iterator[Row]:
    """``most``: points of each arm and kind, evenly spaced over all there are; None for every one."""
    for kind in kinds:
        found = [tortured(ground, arm, KINDS[kind], most) for arm in ground.arms]
        yield Row(TITLES[KINDS[kind]], *found)


def tortured(ground: Ground, arm: Arm, what: int, most: int | None) -> Figure:
    whole = arm.ended(ground.run("whole", arm))
    places = {place.name: place for place in spaced(list(arm.places), most)}
    points: list[Point] = []
    for name, number in ground.each(places, lambda name: counted(ground, arm, places[name], what)):
        of_place = [Point(arm.name, name, what, count) for count in range(1, number + 1)]
        points += of_place if most else spaced(of_place, places[name].most)
    found = ground.each(spaced(points, most), lambda point: judge(ground, arm, places[point.place], point, whole))
    hit = [(point, fault) for point, fault in found if fault != MISSED]
    return Figure(len(hit), [f"{point}: {fault}" for point, fault in hit if fault])


def counted(ground: Ground, arm: Arm, place: Place, what: int) -> int:
    """How many calls there are in that part of a run; of a kind that only writes have, how many of those."""
    folder = ground.place(f"count {arm.name[:4]} {place.name}")

    def count() -> list[int]:
        found: list[int] = []
        with inside(place, ground.calls(), COUNT if what == KILL else TEAR, 0, found.append):
            arm.having(*place.overrides).program(folder)
        return found

    [number] = forks.value(count)
    return int(number)


def judge(ground: Ground, arm: Arm, place: Place, point: Point, whole: dict[str, str]) -> str:
    """What is wrong after this point, or nothing."""
    folder = ground.place(f"{arm.name[:4]} {point}")
    variant = arm.having(*place.overrides)

    def disturbed() -> None:
        with inside(place, ground.calls(), point.what, point.number):
            variant.program(folder)

    died = forks.child(disturbed)
    if point.what != FULL and died.code != -signal.SIGKILL:
        return MISSED if died.code == 0 else f"exit code {died.code}: {died.last}"
    if point.what == FULL and died.code == 0:
        return MISSED
    newest = arm.newest(folder)
    again = forks.child(partial(variant.again, folder))
    fault = refusal(arm, died) if point.what == FULL else ""
    fault = fault or outcome(arm, folder, newest, again, whole)
    shutil.rmtree(folder, ignore_errors=True)
    return fault


def refusal(arm: Arm, died: Ended) -> str:
    """What is wrong with how a full disk was said: one block, that names the cause, and exit code 1."""
    if arm.name != "lowrank":
        return ""
    if died.code != 1 or "Traceback" in died.output or "No space left on device" not in died.last:
        return f"a full disk ended it with exit code {died.code}: {died.output[-600:]}"
    return ""


def outcome(arm: Arm, folder: Any, newest: str, again: Ended, whole: dict[str, str]) -> str:
    if again.code:
        return f"going on fails with exit code {again.code}: {again.last}"
    different = differing(whole, arm.ended(folder))
    if different:
        return f"another end: {', '.join(different)} differ"
    return arm.wrong(folder, again.output, newest)
