"""The closing output of a run in the terminal: before and after, a few samples, where the files are."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from lowrank.report import figures, ledger, lr_range

WIDTH = 100  # columns of a pipe or a file, and the least where the terminal does not say
LINES = 24  # of one prompt
# What a prompt is about, in the templates that we write: the input block, else the last user turn of a chat.
_INPUT = re.compile(r"### Input:\n(.*?)\n*### Response:", re.DOTALL)
_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)


def table(summary: Mapping[str, Any]) -> Table:
    """Held-out loss, perplexity and scores before and after, with the change; ROUGE-L's interval below."""
    gain = figures.gain(summary)
    caption = f"ROUGE-L gain {gain[0]}, 95 % bootstrap interval {gain[1]}" if gain else None
    drawn = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)
    drawn.add_column("held-out evaluation", min_width=20)
    for name in ("before", "after", "change"):
        drawn.add_column(name, justify="right", no_wrap=True, min_width=10)
    for change in figures.changes(summary):
        tone = {True: "green", False: "red", None: ""}[change.better]
        moved = change.change.replace("−", "-")  # a terminal's numbers are copied into other programs
        drawn.add_row(change.label, change.before, Text(change.after, "bold"), Text(moved, tone))
    return drawn


def samples(rows: Iterable[Mapping[str, Any]], n: int = 3) -> Group:
    """The first ``n`` samples: what was asked, the reference, the base's text and the tuned one's."""
    parts: list[RenderableType] = []
    for place, row in enumerate(list(rows)[:n], start=1):
        where = f", row {figures.clean(row['row'])}" if row.get("row") is not None else ""
        parts += [Rule(Text(f"sample {place}{where}"), align="left", style="dim"), _sample(row), Text()]
    return Group(*parts)


def closing(folder: Path, summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Print the table, three samples and the run's figures to standard output; of a run that goes on later the figures.

    Colours only on a terminal, and none under NO_COLOR; a pipe gets at least ``WIDTH`` columns.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without é must not lose the table to an error
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(WIDTH, console.width)
    if summary.get("status") != "interrupted":
        console.print(table(summary))
        console.print(_samples(samples))
    for name, text in _lines(Path(folder), summary):
        console.print(Text.assemble((f"{name:<14}", "dim"), text), soft_wrap=True)


_samples = samples  # ``closing`` has an argument of that name


def subject(prompt: str) -> str:
    """The part of a prompt that a reader wants: the input, without the template around it."""
    found = _INPUT.findall(prompt) or _TURN.findall(prompt)
    return found[-1].strip("\n") if found else prompt.strip("\n")


def _sample(row: Mapping[str, Any]) -> Group:
    lines = figures.clean(subject(str(row.get("prompt") or ""))).split("\n")
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"… {len(lines) - LINES + 1} more lines"]
    answers = Table.grid(padding=(0, 2))
    answers.add_column(no_wrap=True, style="dim")
    answers.add_column(overflow="fold")
    for name, key, style in (("reference", "reference", ""), ("before", "base", ""), ("after", "tuned", "bold")):
        text = figures.clean(row.get(key) or "").strip()
        answers.add_row(name, Text(text or figures.MISSING, style))
    code = Text("\n".join(lines), "cyan")
    return Group(Padding(code, (0, 0, 1, 2), expand=False), Padding(answers, (0, 0, 0, 2), expand=False))


def _lines(folder: Path, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    trained, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    share = f"{figures.fixed(trained)} of {figures.fixed(total)} parameters ({figures.percent(trained, total, 2)})"
    speed = f"{figures.fixed(summary.get('tokens_per_s'))} real tokens/s"
    steps, seconds = figures.fixed(summary.get("steps")), figures.duration(summary.get("seconds"))
    found = lr_range.line(summary)
    return [
        *([("learning rate", found)] if found else []),
        ("speed", f"{speed}, {steps} steps in {seconds}"),
        ("peak memory", ledger.peak(summary)),
        ("trainable", share),
        ("run directory", figures.clean(folder)),
        ("report", figures.clean(folder / "report.html")),
    ]
