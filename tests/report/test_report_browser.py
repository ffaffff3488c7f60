"""report.html in a browser: nothing leaves its box, nothing is asked for, all is there on paper and in the dark."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page, browsing, needs_browser
from cli import SMALL, write_rows

import lowrank
from lowrank.report import run

pytestmark = needs_browser
EVIL = "</p></pre><script>document.title = 'evil'</script><img src=https://example.org/x.png onerror=alert(1)>"
COMMAND = "python train.py 'adapter.targets=[q_proj,v_proj]' loop.steps=6 " + "data.path=a/long/path " * 9


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, cache: None) -> Path:
    """A real run, of which a sample and the command are then made difficult."""
    folder = tmp_path_factory.mktemp("runs")
    rows = write_rows(folder / "my.jsonl")
    more = ["model=tiny_llama", f"data.path={rows}", "loop.steps=6", "eval.every=2", "schedule.warmup=2"]
    finished = lowrank.train([*SMALL, *more], folder / "done")
    samples = [{**row, "tuned": f"{row['base']} {EVIL}"} for row in finished.samples]
    (finished.folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (finished.folder / "profile").mkdir()
    shares = {"matmul": 0.75, "python and other": 0.25}
    (finished.folder / "profile/shares.json").write_text(json.dumps({"shares": shares, "ms": {"matmul": 1234.5}}))
    change(finished.folder, command=COMMAND.strip())
    return finished.folder


def change(folder: Path, **fields: Any) -> None:
    known = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(known | fields))
    told = json.loads((folder / "identity.json").read_text())
    (folder / "identity.json").write_text(json.dumps({**told, "provenance": {**told["provenance"], **fields}}))
    run.write(folder)


@pytest.fixture(scope="module")
def broken(done: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run as it would be had it failed, been stopped and resumed, been killed, or evaluated nothing."""
    folder = tmp_path_factory.mktemp("broken")
    left: dict[str, tuple[str, ...]] = {
        "failed": ("samples.jsonl", "spectra.json"),
        "resumed": (),
        "killed": ("summary.json", "samples.jsonl", "spectra.json", "profile", "ledger.json"),
        "bare": ("samples.jsonl", "spectra.json", "plan.txt"),
    }
    for name, gone in left.items():
        shutil.copytree(done, folder / name)
        for one in gone:
            path = folder / name / one
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        run.write(folder / name)
    change(
        folder / "failed", status="failed", error="step 3: loss is nan in micro-batch 1 of 1. " + "x" * 400, eval=None
    )
    change(folder / "resumed", after_step=3, changed={"loop.steps": "3 → 6"})
    told = json.loads((folder / "resumed/identity.json").read_text())
    (folder / "resumed/identity.json").write_text(json.dumps({**told, "earlier": [{"command": "python train.py"}]}))
    change(folder / "bare", eval={"before": None, "after": {"loss": 2.5, "perplexity": 12.2}})
    return {name: folder / name for name in left}


def shown(browser: Browser, folder: Path, width: int, **how: str) -> Page:
    return browser.open(folder / "report.html", width, **how)


@pytest.mark.parametrize(
    ("width", "how"),
    [(360, {}), (768, {}), (1280, {}), (360, {"scheme": "dark"}), (700, {"media": "print", "scheme": "dark"})],
    ids=["phone", "tablet", "desktop", "dark phone", "paper"],
)
def test_everything_fits_and_can_be_read(browser: Browser, done: Path, width: int, how: dict[str, str]) -> None:
    assert shown(browser, done, width, **how).faults() == []


@pytest.mark.parametrize("name", ["failed", "resumed", "killed", "bare"])
def test_a_run_of_another_course_has_a_whole_page_too(browser: Browser, broken: dict[str, Path], name: str) -> None:
    page = shown(browser, broken[name], 360)
    assert page.faults() == []
    assert page.complaints() == []


def test_the_page_asks_for_nothing_and_says_nothing(browser: Browser, done: Path) -> None:
    page = shown(browser, done, 1280)
    assert page.requests() == [(done / "report.html").as_uri()]
    assert page.complaints() == []
    assert page.run("document.querySelectorAll('script, img, iframe, object, embed, form').length") == 0
    assert EVIL in page.run("document.querySelector('.tuned').innerText")


def test_a_page_that_asks_or_overflows_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(
        '<main><p style="color:#999">faint<p style="white-space:nowrap">' + "long " * 99 + "<section></section>"
        '<img src="https://example.org/x.png"><script>console.error("said")</script></main>'
    )
    page = browser.open(path, 360)
    assert "https://example.org/x.png" in page.requests()
    assert page.complaints()
    assert {fault.split(":")[0] for fault in page.faults()} == {
        "the page scrolls sideways",
        "outside",
        "faint",
        "empty",
    }


def test_dark_is_dark_and_paper_is_white_whatever_the_scheme(browser: Browser, done: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    assert shown(browser, done, 1280).run(ground) == "rgb(250, 249, 246)"
    assert shown(browser, done, 1280, scheme="dark").run(ground) == "rgb(19, 20, 21)"
    assert shown(browser, done, 700, scheme="dark", media="print").run(ground) == "rgba(0, 0, 0, 0)"


def test_what_is_folded_on_a_screen_is_open_on_paper(browser: Browser, done: Path) -> None:
    heights = (
        "[...document.querySelectorAll('details > pre')].map(e => e.checkVisibility({contentVisibilityAuto: true}))"
    )
    assert set(shown(browser, done, 1280).run(heights)) == {False}
    paper = shown(browser, done, 700, media="print")
    assert set(paper.run(heights)) == {True}
    assert paper.pdf().count(b"/Type /Page\n") >= 4


def test_one_click_selects_the_whole_command(browser: Browser, done: Path) -> None:
    page = shown(browser, done, 360)
    at = page.run(
        "(e => (e.scrollIntoView(), e = e.getBoundingClientRect(), [e.x + 9, e.y + 9]))"
        "(document.querySelector('.once'))"
    )
    for kind in ("mousePressed", "mouseReleased"):
        page.ask("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)
    assert page.run("getSelection().toString().trim()") == COMMAND.strip()


def test_the_tokens_that_are_learnt_are_marked_and_the_words_that_came_underlined(browser: Browser, done: Path) -> None:
    page = shown(browser, done, 1280)
    told = json.loads((done / "data.json").read_text())["shown"]
    rows = [json.loads(line) for line in (done.parent / "my.jsonl").read_text().splitlines()]
    marked = page.run("[...document.querySelectorAll('.tokens')].map(e => e.querySelector('mark').textContent)")
    assert marked == [f"{rows[one['row'] - 1]['output']}<|eos|>" for one in told]
    underlined = page.run("[...document.querySelectorAll('ins')].map(e => getComputedStyle(e).textDecorationLine)")
    assert set(underlined) == {"underline"}
    assert page.run("[...document.querySelectorAll('.tuned')].every(e => e.querySelector('ins'))")
