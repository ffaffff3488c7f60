"""report.html: whole, escaped, self-contained, and there for every run whatever became of it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lowrank.errors import RefusedError
from lowrank.report import run

VOID = {"meta", "link", "br", "hr", "img", "input"}
SCORES = {"rouge1": 18.2, "rouge2": 4.0, "rougeL": 15.3, "bleu": 1.4, "chrf": 19.7}
SUMMARY: dict[str, Any] = {
    "status": "done",
    "steps": 6,
    "seconds": 204.0,
    "real_tokens": 96_960,
    "tokens_per_s": 563.4,
    "peak_memory_mb": 2134.2,
    "trainable_parameters": 4_884_480,
    "total_parameters": 139_399_680,
    "eval": {
        "before": {"loss": 4.0612, "perplexity": 58.04, **SCORES},
        "after": {
            "loss": 2.9987,
            "perplexity": 20.06,
            **{name: score + 10 for name, score in SCORES.items()},
            "bleu_signature": "nrefs:1|tok:13a",
            "rougeL_gain": {"mean": 15.69, "low": 12.11, "high": 19.3},
        },
    },
    "seed": 0,
    "versions": {"torch": "2.13.0"},
    "command": ["python", "train.py", "adapter.targets={a: b}"],
}
CONFIG = (
    "model:\n  kind: tiny_llama\nadapter:\n  _target_: lowrank.adapters.LoRA\n  r: 4\nloop:\n  max_grad_norm: 0.3\n"
)
EVIL = "</pre><script>alert('\x1b[31m&\ud800\x00')</script><img src=https://example.org/x.png>"


class Page(HTMLParser):
    """Checks that every element is closed in order; keeps text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def step(number: int, **fields: Any) -> dict[str, Any]:
    usual = {"loss": 4.0 - number / 10, "lr": 5e-4, "grad_norm": 0.4, "tokens_per_s": 500.0 + number}
    spent = {"real_tokens": 800, "seconds": 1.5, "peak_memory_mb": 2000.0}
    return {"event": "step", "step": number, **usual, **spent, **fields}


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {"event": "eval", "step": number, "loss": loss, "perplexity": 2.7**loss}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run of six steps."""
    sample = {"row": 7, "prompt": "def f(x):\n    return x", "reference": "R & D", "base": EVIL, "tuned": "Return x."}
    metrics = [step(n) for n in range(1, 7)] + [evaluation(3, 3.4)]
    texts = {
        "metrics.jsonl": lines(metrics),
        "samples.jsonl": lines([sample] * 5),
        "summary.json": json.dumps(SUMMARY),
        "config.yaml": CONFIG,
        "plan.txt": "model.layers.0 <q_proj>\n",
        "events.log": "started\nfinished\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def written(folder: Path) -> Page:
    path = run.write(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_holds_the_run(folder: Path) -> None:
    page = written(folder)
    facts = ["4.061", "2.999", "−26.2 %", "58.04", "20.06", "+15.69", "+12.11 to +19.30", "563", "2,134 MB"]
    facts += ["4.88 M", "3.50 % of 139.40 M", "3 min 24 s", "6 steps", "tiny_llama · LoRA r 4", "done"]
    facts += ["ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU", "chrF", "nrefs:1|tok:13a", "2.13.0", "R & D", "Return x."]
    facts += ["python train.py 'adapter.targets={a: b}'", "model.layers.0 <q_proj>", "max_grad_norm: 0.3", "clip 0.3"]
    assert [fact for fact in facts if fact not in page.text] == []
    assert page.tags.count("svg") == 5  # loss for a wide and a narrow screen, and three small ones
    assert page.tags.count("article") == 5
    assert "2 more samples" in page.text


def test_sample_text_is_escaped(folder: Path) -> None:
    page = written(folder)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "</pre><script>alert('\ufffd[31m&\ufffd\ufffd')</script>" in page.text


def test_the_page_loads_nothing(folder: Path) -> None:
    page = written(folder)
    loads = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert loads == ["data:,"]
    style = re.search(r"<style>.*?</style>", (folder / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None
    assert "url(" not in style.group()
    assert "@import" not in style.group()


NAMES = ["metrics.jsonl", "samples.jsonl", "summary.json", "config.yaml", "plan.txt", "events.log"]
MORE = ["data.json", "identity.json", "ledger.json"]


@pytest.mark.parametrize("name", NAMES)
def test_any_file_may_be_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    written(folder)


@pytest.mark.parametrize("name", [*NAMES, *MORE])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00{", b"[1, 2]", b"{\n" * 30, b"null", b"[" * 100_000])
def test_any_file_may_hold_anything(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    written(folder)


@pytest.mark.parametrize("value", [None, True, "text", [], {}, float("nan"), float("inf"), -1, 10**400, {"loss": "x"}])
@pytest.mark.parametrize("name", [*SUMMARY, "error"])
def test_any_field_of_the_summary_may_hold_anything(folder: Path, name: str, value: Any) -> None:
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {name: value}))
    written(folder)


def test_an_empty_folder_gets_a_page_that_says_so(tmp_path: Path) -> None:
    page = written(tmp_path)
    assert "unfinished" in page.text
    assert "No step was recorded" in page.text
    assert "svg" not in page.tags


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no such run directory"):
        run.write(tmp_path / "nowhere")


def test_a_run_without_a_summary_is_shown_from_its_metrics(tmp_path: Path) -> None:
    rows = [evaluation(0, 4.06), step(1), step(2), evaluation(2, 3.5), step(3)]
    (tmp_path / "metrics.jsonl").write_text(lines(rows) + '{"event": "step", "st')
    page = written(tmp_path)
    for fact in ("4.060", "3.500", "step 2", "3 steps, 2,400 tokens", "533", "4.5 s", "2,000 MB"):
        assert fact in page.text
    assert "1 of 6 lines of metrics.jsonl could not be read" in page.text


def test_nan_losses_are_marked_and_do_not_stop_the_page(folder: Path) -> None:
    rows = [step(1), step(2, loss=float("nan"), grad_norm=float("inf")), step(3), evaluation(3, float("nan"))]
    (folder / "metrics.jsonl").write_text(lines(rows))
    page = written(folder)
    assert "training nan" in page.text
    assert not [value for name, value in page.attributes if name in ("d", "cx", "cy") and "nan" in value]


def test_a_spike_is_marked_on_the_loss_curve(folder: Path) -> None:
    rows = [step(n, loss=9.5 if n == 3 else 2.0, spike=n == 3) for n in range(1, 7)]
    (folder / "metrics.jsonl").write_text(lines(rows))
    assert "spike 9.5" in written(folder).text
    (folder / "metrics.jsonl").write_text(lines([{**row, "spike": False} for row in rows]))
    assert "spike 9.5" not in written(folder).text


def test_a_run_of_one_step_is_drawn(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text(lines([step(1)]))
    page = written(folder)
    assert "svg" in page.tags
    assert "circle" in page.tags
    assert "Smoothed" not in page.text


def test_of_a_step_written_twice_the_later_row_counts(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text(lines([step(1), step(2, loss=9.75), step(2, loss=3.25), step(3)]))
    text = written(folder).text
    assert "training 3.25" in text
    assert "9.75" not in text


def test_a_failed_run_says_what_happened(folder: Path) -> None:
    failed = SUMMARY | {"status": "failed", "error": "step 6: loss is nan", "eval": None}
    (folder / "summary.json").write_text(json.dumps(failed))
    page = written(folder)
    assert "step 6: loss is nan" in page.text
    assert ("open", "") in page.attributes  # the events


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("stopped_early", 4, "ended after step 4: the held-out loss"),
        ("pruned", {"step": 3, "best": 2.0}, "ended after step 3: other jobs"),
        ("diverged", 2, "ended after step 2: the loss had run away"),
    ],
)
def test_a_run_that_left_its_loop_early_says_why(folder: Path, name: str, value: Any, said: str) -> None:
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {name: value}))
    assert said in written(folder).text
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {name: None}))
    assert "Training ended" not in written(folder).text


def test_what_was_not_measured_has_no_card_and_no_column(folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"eval": {"before": None, "after": {"loss": 2.5}}}))
    page = written(folder)
    headings = re.findall("<th>([a-z ]*)</th>", (folder / "report.html").read_text(encoding="utf-8"))
    assert "after" in headings
    assert not {"before", "change"} & {*headings}
    assert "Perplexity" not in page.text
    assert "2.500" in page.text
    (folder / "summary.json").write_text(json.dumps({"status": "failed", "error": "early"}))
    (folder / "metrics.jsonl").unlink()
    page = written(folder)
    assert "Held-out" not in page.text
    assert ("class", "card") not in page.attributes


def test_rewriting_replaces_the_page_and_leaves_nothing_beside_it(folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    run.write(folder)
    first = (folder / "report.html").read_bytes()
    run.write(folder)
    assert (folder / "report.html").read_bytes() == first
    assert {path.name for path in folder.iterdir()} == before | {"report.html"}
