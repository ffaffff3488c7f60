"""The report's section on what the adapter learnt: every site, whatever the file holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lowrank.report import learnt, run


def site(layer: int | None, part: str, change: float, **fields: Any) -> dict[str, Any]:
    path = part if layer is None else f"model.layers.{layer}.{part}"
    figures = {"effective_rank": 3.5, "stable_rank": 1.25, "singular": [2.0, 1.0, 0.5]}
    return {"path": path, "type": part, "layer": layer, "method": "LoRA", "change": change, **figures, **fields}


def spectra(*sites: Any, **fields: Any) -> dict[str, Any]:
    return {"models": [{"sites": list(sites), "others": [], "notes": [], **fields}], "overlaps": []}


def page(folder: Path, content: object) -> str:
    (folder / "spectra.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return run.write(folder).read_text(encoding="utf-8")


DEEP = spectra(*(site(n, part, 0.01 * (n + 1)) for part in ("q_proj", "up_proj") for n in range(30)))


def test_every_site_is_a_cell_of_both_maps_and_says_its_figures(tmp_path: Path) -> None:
    text = page(tmp_path, DEEP)
    assert text.count("<h2>What the adapter learnt</h2>") == 1
    for row in DEEP["models"][0]["sites"]:
        said = (
            f"<title>{row['path']}\n‖ΔW‖/‖W‖ {row['change']:.4g}\neffective rank 3.50\nstable rank 1.25\nσ 2, 1, 0.5 …"
        )
        assert text.count(said) == 2
    assert "Singular values of ΔW" in text


def test_a_stronger_change_is_a_stronger_colour_in_its_row_and_column(tmp_path: Path) -> None:
    drawn = learnt.draw(learnt.sites_of(DEEP))[0]
    cell = re.compile(
        r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="[\d.]+" rx="3" .*? fill-opacity="([\d.]+)"'
    )
    cells = [tuple(map(float, found)) for found in cell.findall(drawn)]
    assert len(cells) == 60
    width = float(re.search(r'width="(\d+)"', drawn)[1])  # type: ignore[index]
    assert all(0 <= x <= x + wide <= width for x, _, wide, _ in cells)
    for y in {y for _, y, _, _ in cells}:
        row = sorted(one for one in cells if one[1] == y)
        assert len(row) == 30
        assert [one[3] for one in row] == sorted(one[3] for one in row)
        assert row[0][3] < row[-1][3]


def test_curves_are_of_the_sites_that_changed_most_and_least_and_some_between(tmp_path: Path) -> None:
    drawn = learnt.curves(learnt.sites_of(DEEP))
    names = re.findall(r">(\w+ \d+) \([\d.]+ %\)<", drawn)
    assert len(names) == learnt.CURVES
    assert names[0].endswith(" 29")
    assert names[-1].endswith(" 0")


def test_a_site_of_no_layer_and_one_without_singular_values_are_drawn(tmp_path: Path) -> None:
    bare = {"effective_rank": None, "stable_rank": None, "singular": None}
    text = page(tmp_path, spectra(site(None, "embed_tokens", 0.5), site(3, "q_proj", 0.25, **bare)))
    assert "<title>embed_tokens\n" in text
    assert "<title>model.layers.3.q_proj\n‖ΔW‖/‖W‖ 0.25<" in text
    only = page(tmp_path, spectra(site(3, "q_proj", 0.25, **bare)))
    assert "Effective rank of ΔW of each site" not in only
    assert "Singular values of ΔW" not in only


def test_an_untrained_adapter_is_drawn(tmp_path: Path) -> None:
    nothing = {"effective_rank": 0.0, "stable_rank": 0.0, "singular": []}
    text = page(tmp_path, spectra(site(0, "q_proj", 0.0, **nothing)))
    assert "<title>model.layers.0.q_proj\n‖ΔW‖/‖W‖ 0\n" in text


def test_notes_and_other_adapters_are_said(tmp_path: Path) -> None:
    others = [{"path": "model.layers.0", "method": "Bottleneck", "norms": {"up": 1.0}}] * 2
    text = page(tmp_path, spectra(notes=["5 tensors <of> the base train themselves"], others=others))
    assert "5 tensors &lt;of&gt; the base train themselves" in text
    assert "2 adapters are no change of a weight (Bottleneck)." in text


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[" * 100_000, "null", "[1]", '{"models": 3}', '{"models": []}', '{"models": [[]]}'),
        *({"models": [{"sites": 3, "notes": 3, "others": {}}]}, {"models": [{"sites": [3, None, [], {}]}]}),
    ],
)
def test_a_file_that_says_nothing_leaves_no_section(tmp_path: Path, content: object) -> None:
    assert "What the adapter learnt" not in page(tmp_path, content)


def test_a_run_without_the_file_has_no_section(tmp_path: Path) -> None:
    assert "What the adapter learnt" not in run.write(tmp_path).read_text()


@pytest.mark.parametrize(
    "value",
    [None, True, "text", [], {}, -1, 10**400, float("nan"), 1e99, ["x", None, -1, 1e99]],
    ids=lambda value: repr(value)[:20],
)
@pytest.mark.parametrize("name", [*site(0, "q_proj", 0.5)])
def test_any_field_may_hold_anything(tmp_path: Path, name: str, value: Any) -> None:
    page(tmp_path, spectra(site(0, "q_proj", 0.5) | {name: value}, site(1, "q_proj", 0.25)))
    page(tmp_path, spectra(site(1, "q_proj", 0.25), notes=value, others=value))
