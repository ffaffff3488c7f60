"""The closing output: complete, clean in a pipe, and never obeying what a model wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from lowrank.report import figures, terminal

MEASURED = ("loss", "perplexity", "rouge1", "rouge2", "rougeL", "bleu", "chrf")
SUMMARY: dict[str, Any] = {
    "status": "done",
    "steps": 120,
    "seconds": 204.0,
    "tokens_per_s": 563.4,
    "peak_memory_mb": 2134.2,
    "trainable_parameters": 4_884_480,
    "total_parameters": 139_399_680,
    "eval": {
        "before": dict(zip(MEASURED, (4.0, 54.6, 18.2, 4.0, 15.3, 1.4, 20.0), strict=True)),
        "after": {
            **dict(zip(MEASURED, (3.0, 20.1, 30.0, 9.0, 15.3, 1.2, 28.0), strict=True)),
            "rougeL_gain": {"mean": 8.25, "low": 6.5, "high": 10},
        },
    },
}
PROMPT = "### Instruction:\nSummarise.\n\n### Input:\ndef f(x):\n    return x\n\n### Response:\n"
ROWS = [
    {"row": row, "prompt": PROMPT, "reference": "Return x.", "base": "[red]\x1b[31mno[/red]", "tuned": f"tuned {row}"}
    for row in range(5)
]
CLOSE = (
    "import json, sys, pathlib; from lowrank.report import terminal; "
    "terminal.closing(pathlib.Path(sys.argv[1]), *json.loads(sys.stdin.read()))"
)


def shown(renderable: RenderableType, width: int = 100) -> str:
    console = Console(width=width, no_color=True, markup=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def closed(folder: Path, **environment: str) -> bytes:
    """What a process of its own writes to a pipe."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE")
    }
    done = subprocess.run(
        [sys.executable, "-c", CLOSE, str(folder)],
        input=json.dumps([SUMMARY, ROWS]).encode(),
        env=clean | environment,
        capture_output=True,
        check=True,
    )
    return done.stdout


def test_the_table_shows_before_after_and_change() -> None:
    rows = {line.split("  ")[0].strip(): line.split() for line in shown(terminal.table(SUMMARY)).splitlines() if line}
    assert rows["held-out loss"][-5:] == ["4.000", "3.000", "-1.000", "(-25.0", "%)"]
    assert rows["perplexity"][-5:] == ["54.60", "20.10", "-34.50", "(-63.2", "%)"]
    assert rows["ROUGE-1"][-3:] == ["18.20", "30.00", "+11.80"]
    assert rows["BLEU"][-3:] == ["1.40", "1.20", "-0.20"]
    assert {"ROUGE-2", "ROUGE-L", "chrF"} <= set(rows)
    assert "+8.25, 95 % bootstrap interval +6.50 to +10.00" in shown(terminal.table(SUMMARY))


def test_better_and_worse_depend_on_the_measure() -> None:
    better = {change.label: change.better for change in figures.changes(SUMMARY)}
    assert better == {
        **{"held-out loss": True, "perplexity": True, "ROUGE-1": True, "ROUGE-2": True},
        **{"ROUGE-L": None, "BLEU": False, "chrF": True},
    }


@pytest.mark.parametrize("summary", [{}, {"eval": None}, {"eval": {"before": None, "after": {"loss": float("nan")}}}])
def test_a_summary_cut_short_still_prints(summary: dict[str, Any]) -> None:
    shown(terminal.table(summary))


def test_samples_show_code_reference_before_and_after_of_the_first_three() -> None:
    text = shown(terminal.samples(ROWS))
    for part in ("def f(x):", "return x", "reference", "Return x.", "before", "after", "tuned 0", "tuned 2"):
        assert part in text
    assert "tuned 3" not in text
    assert "Summarise" not in text


def test_markup_and_escapes_of_a_model_are_printed_not_obeyed() -> None:
    assert "[red]\ufffd[31mno[/red]" in shown(terminal.samples(ROWS))


def test_a_long_prompt_is_cut_and_says_so() -> None:
    text = shown(terminal.samples([{"prompt": "\n".join(f"line {n}" for n in range(100))}]))
    assert "line 22" in text
    assert "line 23" not in text
    assert "… 77 more lines" in text


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (PROMPT, "def f(x):\n    return x"),
        ("<|im_start|>system\nhi<|im_end|>\n<|im_start|>user\ncode<|im_end|>\n<|im_start|>assistant\n", "code"),
        ("plain text\n", "plain text"),
    ],
)
def test_the_subject_of_a_prompt_is_what_its_template_holds(prompt: str, expected: str) -> None:
    assert terminal.subject(prompt) == expected


def test_a_pipe_gets_no_escape_codes_and_a_hundred_columns(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    text = closed(folder).decode()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) >= terminal.WIDTH
    lines = [line.rstrip() for line in text.splitlines()]
    assert f"run directory {folder}" in lines  # one line, however long: it is copied
    assert f"report        {folder / 'report.html'}" in lines
    assert "trainable     4,884,480 of 139,399,680 parameters (3.50 %)" in lines
    assert "speed         563 real tokens/s, 120 steps in 3 min 24 s" in lines
    assert "peak memory   2,134 MB" in lines


def test_an_ascii_pipe_loses_characters_not_the_output(tmp_path: Path) -> None:
    text = closed(tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0").decode("ascii")
    assert "-1.000 (-25.0 %)" in text


def test_no_color_wins_on_a_terminal(tmp_path: Path) -> None:
    coloured = closed(tmp_path, FORCE_COLOR="1", TERM="xterm-256color")
    assert b"\x1b[32m" in coloured or b"\x1b[36m" in coloured
    plain = closed(tmp_path, FORCE_COLOR="1", NO_COLOR="1", TERM="xterm-256color")
    assert not any(f"\x1b[{code}m".encode() in plain for code in range(30, 50))
