"""The ranks on report.html: true to what was told, readable for a few sites and for hundreds, there only where told."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from lowrank.report import ranks, run, svg
from lowrank.report.ranks import Ranks

PARTS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
NS = "{http://www.w3.org/2000/svg}"


def told(step: float, found: dict[str, Any]) -> dict[str, Any]:
    return {"event": "ranks", "step": step, "ranks": found}


def rows_of(layers: int, parts: list[str] = PARTS) -> list[dict[str, Any]]:
    """Layer by layer as a model has them; each site falls from 8 to its layer's number, at most 8, at step 20."""
    paths = [(f"model.layers.{layer}.{part}", layer) for layer in range(layers) for part in parts]
    return [
        told(1, {path: 8 for path, _ in paths}),
        told(20, {path: min(layer, 8) for path, layer in paths}),
        told(50, {path: min(layer, 8) for path, layer in paths}),
    ]


def ranks_of(rows: list[dict[str, Any]]) -> Ranks:
    found = ranks.ranks_of(rows)
    assert found is not None
    return found


def titles(text: str) -> list[str]:
    return [one.text or "" for one in ET.fromstring(text).iter(f"{NS}title")]


def test_sites_are_grouped_by_what_they_are_and_then_by_layer() -> None:
    found = ranks_of(rows_of(12))
    assert [part for part, _ in found.parts()] == PARTS
    assert [found.sites[place].layer for _, places in found.parts() for place in places] == list(range(12)) * 3


def test_gpt_2_s_two_projections_of_one_name_are_two_parts_and_a_head_is_one_of_its_own() -> None:
    paths = ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", "lm_head"]
    found = ranks_of([told(1, dict.fromkeys(paths, 2))])
    assert [part for part, _ in found.parts()] == ["attn.c_proj", "mlp.c_proj", "lm_head"]
    ET.fromstring(ranks.final(found))


@pytest.mark.parametrize("layers", [1, 2, 70])
@pytest.mark.parametrize("theme", [svg.PAPER, svg.PAGE], ids=["paper", "page"])
def test_every_site_answers_to_the_pointer_in_a_picture_of_a_screen_s_width(layers: int, theme: svg.Theme) -> None:
    found = ranks_of(rows_of(layers))
    for text in (ranks.over_time(found, 50, theme=theme), ranks.final(found, theme=theme)):
        root = ET.fromstring(text)
        assert float(root.get("width", "")) == 1072
        assert float(root.get("height", "")) < 1400
        said = titles(text)
        assert len(said) == 3 * layers
        assert "model.layers.0.mlp.down_proj\nrank 8 → 0" in said
        assert not re.search(r"nan|inf", text)
        assert len(text) < 400 * 3 * layers + 8000


def cells(text: str) -> dict[str, float]:
    """What is drawn in the map at each (x, y, to x), with its strength."""
    found = {}
    for path in ET.fromstring(text).iter(f"{NS}path"):
        for x, y, to in re.findall(r"M([\d.]+) ([\d.]+)v[\d.]+H([\d.]+)v", path.get("d", "")):
            found[f"{x} {y} {to}"] = float(path.get("fill-opacity", ""))
    return found


def test_a_cell_lasts_until_its_rank_changes_and_is_as_strong_as_the_rank() -> None:
    rows = [told(1, {"a.0.q": 4, "a.1.q": 4}), told(10, {"a.0.q": 4, "a.1.q": 1}), told(30, {"a.0.q": 2, "a.1.q": 0})]
    drawn = cells(ranks.over_time(ranks_of(rows), 40))
    assert drawn.keys() == {"0 0 30", "30 0 40", "0 14 10", "10 14 30"}  # two rows of 14 pixels; rank 0 is not drawn
    assert drawn["0 0 30"] == drawn["0 14 10"] == 1.0
    assert drawn["0 0 30"] > drawn["30 0 40"] > drawn["10 14 30"] > 0


def test_the_final_ranks_stand_in_their_cells() -> None:
    root = ET.fromstring(ranks.final(ranks_of(rows_of(3, ["q"]))))
    assert [one.text for one in root.iter(f"{NS}text")][1:] == ["0", "1", "2", "q", "0", "1", "2"]


def test_rows_of_one_step_are_one_and_a_site_keeps_its_rank_where_a_row_is_not_about_it() -> None:
    rows = [told(1, {"q": 4}), told(1, {"v": 6}), told(5, {"q": 2}), told(9, {"v": 1}), told(9, {"v": 3})]
    found = ranks_of(rows)
    assert (found.steps, found.table) == ([1, 5, 9], [[4, 2, 2], [6, 6, 3]])
    later = ranks_of([told(1, {"q": 4}), told(5, {"v": 2})])
    assert later.table == [[4, 4], [None, 2]]
    ET.fromstring(ranks.over_time(later, 9))


def test_of_very_many_steps_the_first_the_last_and_some_between_are_drawn() -> None:
    found = ranks_of([told(step, {"q": 5000 - step}) for step in range(1, 5000)])
    assert (found.steps[0], found.steps[-1]) == (1, 4999)
    assert 100 < len(found.steps) < 200
    assert [row[-1] for row in found.table] == [1]


STRANGE: list[Any] = [None, [], {}, {"q": None}, {"q": "x"}, {"q": -1}, {"q": float("nan")}, {"q": True}, "text", 3]


@pytest.mark.parametrize("value", STRANGE, ids=repr)
def test_rows_that_tell_nothing_draw_nothing(value: Any) -> None:
    assert ranks.ranks_of([{"event": "ranks", "step": 3, "ranks": value}]) is None
    assert ranks.ranks_of([told(-1, {"q": 1}), {"ranks": {"q": 1}}]) is None


@pytest.mark.parametrize(
    "found",
    [{"<script>&\x00": 2, "a." * 300: 1}, {"layers.99999999999.q": 1e90, "layers..q": 0}, {"": 0.5, "0": 7, "²": 1}],
    ids=["hostile", "huge", "odd"],
)
def test_strange_names_and_numbers_are_still_a_picture(found: dict[str, Any]) -> None:
    for text in (ranks.over_time(ranks_of([told(1e90, found)]), 0), ranks.final(ranks_of([told(1, found)]))):
        for element in ET.fromstring(text).iter():
            for name in ("x", "y", "width", "height"):
                assert float(element.get(name, "0")) >= 0


def test_the_page_shows_ranks_where_the_run_told_of_them_and_only_there(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows_of(2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = run.write(tmp_path).read_text(encoding="utf-8")
    assert page.count("<svg") == 3  # the map lies within the first picture
    assert "model.layers.1.self_attn.q_proj\nrank 8 → 1" in page
    (tmp_path / "metrics.jsonl").write_text("")
    page = run.write(tmp_path).read_text(encoding="utf-8")
    assert "<svg" not in page
    assert "Ranks" not in page
