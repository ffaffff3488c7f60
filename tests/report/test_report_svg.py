"""Charts: valid XML alone, readable axes, honest curves."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lowrank.report import curves, svg
from lowrank.report.curves import Series

NAN, INF = math.nan, math.inf
XS = list(range(1, 101))
LOSS = [3 + math.exp(-x / 20) for x in XS]
SHAPES = {
    "two runs": [Series("ours", XS, LOSS), Series("theirs", XS, [y + 0.1 for y in LOSS], "dashed")],
    "every style": [Series(style, XS, LOSS, style) for style in ("line", "thin", "dashed", "points")],
    "one point": [Series("one", [1], [2.5])],
    "constant": [Series("flat", XS, [0.0] * 100)],
    "holes": [Series("holed", XS, [NAN, INF, *LOSS[2:50], NAN, *LOSS[51:]], "thin")],
    "nothing finite": [Series("lost", [1, 2, 3], [NAN, NAN, -INF])],
    "empty": [Series("empty", [], [])],
    "no series": [],
    "hostile names": [Series("<script>\x00\x1b[31m&\"'</script>", XS, LOSS)],
    "huge and tiny": [Series("a", [0, 1e12], [1e-9, 1e9])],
}


def parsed(text: str) -> ET.Element:
    """The root; raises where ``text`` is no XML."""
    return ET.fromstring(text)


@pytest.mark.parametrize("series", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("theme", [svg.PAPER, svg.PAGE], ids=["paper", "page"])
@pytest.mark.parametrize("floor", [None, 0.0])
def test_every_chart_is_xml_with_finite_coordinates(
    series: list[Series], theme: svg.Theme, floor: float | None
) -> None:
    text = svg.chart(series, title="t", x_label="step", y_label="y", y_floor=floor, theme=theme)
    root = parsed(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for element in root.iter():
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d"):
            assert not re.search("nan|inf", element.get(name, ""))
        assert float(element.get("width", "1")) >= 0


def test_a_standalone_chart_brings_its_ground_and_loads_nothing() -> None:
    text = svg.chart(SHAPES["two runs"], title="Loss", x_label="step", y_label="loss")
    ground = next(one for one in parsed(text).iter() if one.tag.endswith("rect"))
    assert ground.get("fill") == "#ffffff"
    assert "var(" not in text
    assert "href" not in text
    assert all(name in text for name in ("ours", "theirs", "Loss", "step"))


def test_a_chart_in_a_page_takes_the_page_s_colours() -> None:
    text = svg.chart(SHAPES["two runs"], theme=svg.PAGE)
    assert "var(--hue-0" in text
    assert "<rect x=" not in text.replace('<rect class="lr-column"', "")


def test_a_value_that_is_not_finite_breaks_the_line_and_is_marked() -> None:
    text = svg.chart([Series("loss", [1, 2, 3, 4, 5], [1, 2, NAN, 2, 1])])
    lines = [one.get("d", "") for one in parsed(text).iter() if one.get("fill") == "none"]
    assert max(line.count("M") for line in lines) == 2
    assert text.count(svg.PAPER.alarm) == 1
    assert "loss nan" in text


def test_every_held_out_point_answers_to_the_pointer() -> None:
    marked = list(range(7, 5000, 777))
    series = [
        Series("training", list(range(5000)), [1.0 + x % 7 for x in range(5000)], "thin"),
        Series("held-out", marked, [2.0] * len(marked), "points"),
    ]
    text = svg.chart(series, x_label="step")
    titles = [one.text or "" for one in parsed(text).iter() if one.tag.endswith("title")]
    assert sum("held-out" in title for title in titles) == len(marked)
    assert len(titles) < 300
    assert len(text) < 150_000


def test_thinning_keeps_every_spike() -> None:
    run = [(float(x), 100.0 if x in (333, 4321) else x % 3) for x in range(10_000)]
    kept = curves.thinned(run, buckets=100)
    assert len(kept) <= 202
    assert {(333.0, 100.0), (4321.0, 100.0)} <= set(kept)
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (run[0], run[-1])


def test_smoothing_is_the_weighted_line_through_what_is_known() -> None:
    ys = [1.0, 4.0, NAN, 2.0, 8.0, 3.0, 3.5, INF, 1.0]
    sigma = 1.3
    for place, got in enumerate(curves.smooth(ys, sigma)):
        near = [n for n, y in enumerate(ys) if math.isfinite(y) and abs(n - place) <= math.ceil(3 * sigma)]
        away = np.array(near, dtype=float) - place
        weight = np.exp(-0.25 * (away / sigma) ** 2)  # polyfit squares its weights
        expected = np.polyfit(away, [ys[n] for n in near], 1, w=weight)[-1]
        assert got == pytest.approx(expected, rel=1e-9)


def test_smoothing_leaves_a_line_as_it_is_to_its_ends() -> None:
    line = [4.0 - 0.01 * x for x in range(200)]
    holed = [NAN if x % 7 == 3 else y for x, y in enumerate(line)]
    assert curves.smooth(line) == pytest.approx(line)
    assert curves.smooth(holed) == pytest.approx(line)


def test_smoothing_takes_noise_away() -> None:
    noisy = [3.0 + (-1) ** x for x in range(300)]
    assert curves.smooth(noisy)[30:270] == pytest.approx([3.0] * 240, abs=1e-3)


@pytest.mark.parametrize("ys", [[], [1.0], [NAN], [NAN] * 9, [INF, 1.0]])
def test_smoothing_returns_as_many_values_as_it_got(ys: list[float]) -> None:
    assert len(curves.smooth(ys)) == len(ys)


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 120, True, ["0", "20", "40", "60", "80", "100", "120"]),
        (0, 5e-4, False, ["0", "1e-4", "2e-4", "3e-4", "4e-4", "5e-4"]),
        (2.4, 4.3, False, ["2.5", "3.0", "3.5", "4.0"]),
        (0.9, 2.1, True, ["1", "2"]),
        (0, 20000, False, ["0", "5k", "10k", "15k", "20k"]),
        (-1, 1, False, ["−1.0", "−0.5", "0", "0.5", "1.0"]),
    ],
)
def test_ticks_are_round_and_their_labels_agree(low: float, high: float, whole: bool, expected: list[str]) -> None:
    assert curves.labels(curves.ticks(low, high, about=6 if high > 100 and whole else 5, whole=whole)) == expected
