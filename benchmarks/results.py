"""What was measured, from rows to figures.

``results/PIECE.jsonl`` has a line of conditions and a row for each process that ran; ``results.json`` what all pieces
that are done come to: for each arm its figures, a value a round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.pieces import Piece

SAME = {"fp32": 1e-3, "bf16": 0.05}  # losses further apart than this are not of the same training
KEPT = ("command", "device", "cpu", "cores", "flags", "threads", "python", "versions", "commit")


@dataclass(frozen=True)
class File:
    """The rows of one piece: appended as they are measured, so that a broken run goes on."""

    path: Path

    def begin(self, about: Mapping[str, Any]) -> int:
        """Rounds that are there already under these conditions; a file of others is begun anew."""
        if self.path.is_file() and like(self.about, about):
            return self.rounds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    @property
    def about(self) -> dict[str, Any]:
        return self.lines[0] if self.path.read_text(encoding="utf-8") else {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.lines[1:]

    @property
    def rounds(self) -> int:
        return max((row["round"] for row in self.rows), default=0)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A whole round at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def like(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether rows under these two conditions may stand in one file: all but who asked for how much of it."""
    return all(one.get(name) == other.get(name) for name in KEPT if name != "command")


def figures(output: str, warmup: int) -> dict[str, Any]:
    """Of the last line that an arm printed: a run's (see ``arm.Result``) in figures, or figures as they are."""
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    if "token_hashes" not in found:
        return found
    timed = slice(warmup, None)
    seconds, tokens = found["seconds"][timed], found["real_tokens"][timed]
    return {
        "tokens_per_s": sum(tokens) / sum(seconds),
        "seconds": median(seconds),
        "peak_mb": found["peak_mb"],
        "tokens": sum(found["real_tokens"]),
        "positions": sum(found["positions"]),
        "trained": found["trainable_parameters"],
        "losses": found["losses"],
        "lrs": found["lrs"],
        "hashes": found["token_hashes"],
        "predicted": found["predicted"],
        "note": found["note"],
    }


def refuse_different_work(piece: Piece, rows: Sequence[Mapping[str, Any]]) -> None:
    """A speed is comparable only between arms that trained the same: SystemExit where peers of one task did not."""
    arms = {arm.name: arm for arm in piece.arms}
    whole = [row for row in rows if "losses" in row]
    for row in whole:
        arm = arms[row["arm"]]
        others = [other for other in whole if arms[other["arm"]].task == arm.task]
        unlike = {
            what for other in others for what in differing(row, other, arm.ordered and arms[other["arm"]].ordered)
        }
        if unlike:
            raise SystemExit(f"{piece.name}: the arms did not do the same work: {', '.join(sorted(unlike))} differ")


def differing(one: Mapping[str, Any], other: Mapping[str, Any], ordered: bool) -> list[str]:
    """What two arms did differently that should have been the same; of other orders, only how much there was."""
    if not ordered:
        return [what for what in ("tokens", "trained") if one[what] != other[what]]
    unlike = [what for what in ("tokens", "trained", "hashes") if one[what] != other[what]]
    if any(abs(a - b) > 1e-12 for a, b in zip(one["lrs"], other["lrs"], strict=True)):
        unlike.append("lrs")
    if not apart(one, other) <= SAME[one["precision"]]:  # nan is not close
        unlike.append("losses")
    return unlike


def apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest distance between two losses of a step."""
    distances = [abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True)]
    return max(distances) if all(d == d for d in distances) else float("nan")


DRAWN = ("tokens_per_s", "seconds", "peak_mb", "saved_mb", "formula_mb", "extra_mb", "products", "positions")
RATES = ("products", "attention", "copy", "dequantise")


def summary(piece: Piece, file: File) -> dict[str, Any]:
    """A piece in figures: of each arm a list a figure, a value a round."""
    arms: dict[str, Any] = {}
    for arm in piece.arms:
        rows = [row for row in file.rows if row["arm"] == arm.name]
        failed = sorted({row["failed"] for row in rows if row.get("failed")})
        names = dict.fromkeys((*DRAWN, *RATES, "loss"))
        found = {name: [rounded(row[name]) for row in rows if name in row] for name in names}
        arms[arm.name] = {
            **({} if arm.x is None else {"x": arm.x}),
            **({} if arm.work is None else {"flops": [rounded(arm.work.products), rounded(arm.work.attention)]}),
            **{name: values for name, values in found.items() if values},
            **({"failed": failed} if failed else {}),
            **ledger([row["predicted"] for row in rows if row.get("predicted")]),
        }
    kept = {name: value for name, value in file.about.items() if name in KEPT}
    others = max((row["others"] for row in file.rows), default=0.0)
    about = {**kept, "others": round(others, 3)}
    curve = {"curve": asdict(piece.curve)} if piece.curve else {}
    return {"about": about, "arms": arms, **losses(piece, file), **curve}


def losses(piece: Piece, file: File) -> dict[str, Any]:
    """The losses of a piece that compares them: how far those of the first two arms are apart, and each of the two from
    the last, which is in fp64."""
    if not piece.losses:
        return {}
    found = {row["arm"]: row for row in file.rows if "losses" in row}
    one, other, exact = (found[arm.name] for arm in piece.arms)
    curves = {name: [rounded(loss, 8) for loss in row["losses"]] for name, row in found.items()}
    distances = {"apart": apart(one, other), "peer_from_fp64": apart(one, exact), "from_fp64": apart(other, exact)}
    return {"losses": curves, **{name: rounded(value, 2) for name, value in distances.items()}}


def ledger(predicted: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {"predicted": {name: rounded(value) for name, value in predicted[0].items()}} if predicted else {}


def rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def read(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """A line an arm: small, and what changes shows."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, piece in found.items():
        parts = {key: value for key, value in piece.items() if key != "arms"}
        arms = ",\n".join(f"   {dump(arm)}: {dump(value)}" for arm, value in piece["arms"].items())
        lines.append(f' {dump(name)}: {{\n  "arms": {{\n{arms}\n  }},\n  {dump(parts)[1:-1]}\n }}')
    (folder / "results.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
