"""sweep.html: whole, escaped, self-contained, readable without its script, and there whatever became of the runs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sweeping import copied

from lowrank.compare import write
from lowrank.compare.groups import gather
from lowrank.compare.page import page
from lowrank.compare.ranking import Choice, ranked
from lowrank.errors import ConfigError

EVIL = "<script>alert('1')<&\"'"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that every element is closed in order; keeps text, tags, attributes and what each table holds."""

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
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def made(*folders: Path, heat: tuple[str, ...] = (), choice: Choice = Choice()) -> str:  # noqa: B008
    return page(ranked(gather(folders), choice), folders[0], heat)


def test_the_page_loads_nothing_and_follows_the_readers_colours_and_paper(sweep: Path) -> None:
    text = made(sweep)
    found = Page(text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)
    assert [value for name, value in found.attributes if name == "src"] == []
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_policy_allows_the_pages_own_script_and_no_other(sweep: Path) -> None:
    text = made(sweep)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in text or f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_every_run_is_listed_by_its_folder_and_every_plot_is_there(sweep: Path) -> None:
    text = made(sweep)
    for run in gather([sweep]).runs:
        assert run.name in text
    for title in ("Every configuration", "Against", "Held-out loss over training", "Median held-out loss by"):
        assert title in text


def test_hostile_names_settings_and_causes_are_text(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    for place, loss in enumerate((3.0, 2.0, 4.0)):
        copied(original, folder / f"{EVIL}{place}", loss, adapter__r=2 + place, model__name=f"{EVIL}{place}")
    (folder / f"javascript:{EVIL}").mkdir()
    (folder / f"javascript:{EVIL}" / "summary.json").write_text(json.dumps({"status": "failed", "error": EVIL}))
    (folder / f"{EVIL}0" / "report.html").write_text("")
    text = made(folder)
    found = Page(text)
    assert found.tags.count("script") == 1
    assert text.count("<script>alert") == 0
    assert f"{EVIL}0" in found.text
    assert f"javascript:{EVIL}" in found.text
    links = [value for name, value in found.attributes if name == "href" and not value.startswith("data:")]
    assert len(links) == 1
    assert links[0].startswith("./%3Cscript%3E")
    assert not [name for name, _ in found.attributes if name.startswith("on")]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_page_of_few_runs_is_whole(original: Path, tmp_path: Path, count: int) -> None:
    for place in range(count):
        copied(original, tmp_path / f"run-{place}", 3.0 + place, adapter__r=2 + place)
    found = Page(made(tmp_path))
    assert f"run-{count - 1}" in found.text


def test_many_values_of_a_key_are_drawn_to_scale_and_put_into_classes(original: Path, tmp_path: Path) -> None:
    for place in range(14):
        rate, rank = 10 ** (-4 + place / 7), 2 + place % 2
        copied(original, tmp_path / f"run-{place}", 3.0 + place % 5, optim__lr=rate, adapter__r=rank)
    text = made(tmp_path)
    Page(text)
    assert not re.search(r"\b(nan|inf)\b", text)
    assert re.search(r"1e-4 – \S+", text)


def test_the_heat_map_is_of_the_keys_asked_for(sweep: Path) -> None:
    assert "by lr and r" in made(sweep, heat=("optim.lr", "adapter.r"))
    with pytest.raises(ConfigError, match=r"Did you mean 'optim\.lr'"):
        made(sweep, heat=("optim.lrr", "adapter.r"))


def test_without_a_finished_run_the_page_names_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "summary.json").write_text(json.dumps({"status": "failed", "error": "out of luck"}))
    found = Page(made(tmp_path))
    assert "out of luck" in found.text
    assert "job" in found.text


def test_metrics_that_are_torn_or_missing_leave_the_page_whole(original: Path, tmp_path: Path) -> None:
    for place in range(3):
        copied(original, tmp_path / str(place), 3.0 + place, adapter__r=2 + place)
    (tmp_path / "0" / "metrics.jsonl").write_bytes(b'{"event": "step", "step": 1, "loss"\n\xff\xfe\n[1]\n')
    (tmp_path / "1" / "metrics.jsonl").unlink()
    Page(made(tmp_path))


def test_a_sweep_never_fails_for_its_page(tmp_path: Path, sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write(tmp_path / "nothing") == tmp_path / "nothing" / "sweep.html"
    assert "no such folder" in capsys.readouterr().err
    assert write(sweep, "no.such.metric").is_file()
    assert capsys.readouterr().err == ""
