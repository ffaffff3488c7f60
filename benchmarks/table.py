"""What ``vs_peft.py`` found, as Markdown, as JSON, and as a picture of the two loss curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from benchmarks.arm import Result
from lowrank.report.curves import Series
from lowrank.report.svg import chart

BEGIN, END = "<!-- vs_peft: written by vs_peft.py --write -->", "<!-- /vs_peft -->"
FASTER, SMALLER = 2.0, 0.5  # the goals


class Pair(Protocol):
    """One run of each arm, one after the other."""

    @property
    def peer(self) -> Result: ...
    @property
    def ours(self) -> Result: ...
    @property
    def others(self) -> float: ...


def apart(peer: Result, ours: Result) -> float:
    """The largest distance between the two losses of a step."""
    return max(abs(a - b) for a, b in zip(peer.losses, ours.losses, strict=True))


def line(pair: Pair, warmup: int) -> str:
    """A pair in a line."""
    peer, ours = pair.peer.tokens_per_s(warmup), pair.ours.tokens_per_s(warmup)
    return (
        f"{peer:,.0f} → {ours:,.0f} real tokens/s ({ours / peer:.2f}×), "
        f"{pair.peer.peak_mb:,.0f} → {pair.ours.peak_mb:,.0f} MB, other processes {pair.others:.0%}"
    )


def markdown(pairs: Sequence[Pair], warmup: int, about: Mapping[str, Any]) -> str:
    """The table: of each row the medians of both arms, and the ratio's median over pairs, each with its range."""
    peers, ours = [pair.peer for pair in pairs], [pair.ours for pair in pairs]
    speeds = [[one.tokens_per_s(warmup) for one in arm] for arm in (peers, ours)]
    times = [[one.seconds_a_step(warmup) for one in arm] for arm in (peers, ours)]
    memory = [[one.peak_mb for one in arm] for arm in (peers, ours)]
    work = [[sum(one.positions[warmup:]) / len(one.positions[warmup:]) for one in arm] for arm in (peers, ours)]
    rows = [
        ("", "PEFT + Trainer", "lowrank", "ratio", "goal"),
        ("---", "---:", "---:", "---:", "---:"),
        ("real tokens/s", *cells(speeds, ",.0f"), f"≥ {FASTER}×"),
        ("seconds a step", *cells(times, ".2f"), ""),
        ("positions computed a step", *cells(work, ",.0f"), ""),
        ("peak RSS, MB", *cells(memory, ",.0f"), f"≤ {SMALLER}×"),
    ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *notes(pairs, warmup, about)])


def cells(values: Sequence[Sequence[float]], form: str) -> tuple[str, str, str]:
    """Peer, ours, and ours ÷ peer pair by pair."""
    peer, ours = values
    return spread(peer, form), spread(ours, form), spread([b / a for a, b in zip(peer, ours, strict=True)], ".2f", "×")


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """``163 (160–165)``: median, lowest, highest."""
    middle, low, high = (format(value, form) for value in (median(values), min(values), max(values)))
    return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low}–{high})"


def notes(pairs: Sequence[Pair], warmup: int, about: Mapping[str, Any]) -> list[str]:
    """What a reader needs to judge the table, and to make it again."""
    one, timed = pairs[0], about["steps"] - warmup
    versions = {**one.peer.versions, **one.ours.versions}
    flags = ", ".join(about["flags"]) or "none of AVX2, AVX-512, AMX"
    threads = f"{one.ours.threads} {'thread' if one.ours.threads == 1 else 'threads'}"
    real = sum(one.ours.real_tokens[warmup:]) / timed
    return [
        f"{about['model']}, {about['data']}, fp32, LoRA r16 on every linear layer but the head "
        f"({one.ours.trainable_parameters:,} parameters), {about['micro_batch']} examples a step "
        f"({real:,.0f} real tokens on average), {timed} timed steps after {warmup}; "
        f"median (lowest–highest) of {len(pairs)} alternating {'pair' if len(pairs) == 1 else 'pairs'}.",
        "",
        f"- Largest difference between the two losses of a step: {max(apart(p.peer, p.ours) for p in pairs):.1e}.",
        f"- {about['cpu']}, {about['cores']} cores, {threads} ({flags}); other processes took at most "
        f"{max(pair.others for pair in pairs):.0%} of the machine's time.",
        f"- {', '.join(f'{name} {number}' for name, number in sorted(versions.items()))}.",
        f"- `{about['command']}`",
    ]


def write(folder: Path, found: str, pairs: Sequence[Pair], about: Mapping[str, Any]) -> None:
    """Everything measured as JSON, the curves as SVG, and the table between the marks of README.md."""
    pairs_found = [{"peer": asdict(p.peer), "ours": asdict(p.ours), "others": p.others} for p in pairs]
    content = json.dumps({**about, "pairs": pairs_found}, indent=1, ensure_ascii=False)
    (folder / "vs_peft.json").write_text(content + "\n", encoding="utf-8")
    (folder / "vs_peft.svg").write_text(curves(pairs[0]), encoding="utf-8")
    readme = folder / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{readme}: no place for the table: {BEGIN} … {END}")
    picture = "![Training loss of both arms, step by step](vs_peft.svg)"
    readme.write_text(f"{before}{begin}\n{found}\n\n{picture}\n{end}{after}", encoding="utf-8")


def curves(pair: Pair) -> str:
    """Both losses against the step: one as a line, the other as points, so that both show where they coincide."""
    steps = list(range(1, len(pair.ours.losses) + 1))
    series = [
        Series("PEFT + Trainer", steps, pair.peer.losses, hue=1),
        Series("lowrank", steps, pair.ours.losses, style="points", hue=0),
    ]
    return chart(series, title="Training loss", x_label="optimizer step", y_label="nats a target token")
