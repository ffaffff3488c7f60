"""The studies of docs/experiments.md: what their files sweep over is what the tables name, and the tables are true."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from benchmarks import experiments
from benchmarks.experiments import read, section, verdict
from benchmarks.marks import placed
from benchmarks.studies import STUDIES, Claim
from lowrank import compose
from lowrank.compare.keys import flat

CONF = compose.find_conf()
NAMES = pytest.mark.parametrize("name", STUDIES)


def arms_of(name: str) -> list[str]:
    """The arm of each job that the study's file sweeps over, seed 0."""
    params = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert params.pop("loop.seed") == "0,1,2"
    overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    jobs = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
    configs = [compose.compose([f"experiment={name}", *job]) for job in jobs]
    assert {(c.loop.precision, c.eval.limit, c.eval.before) for c in configs} == {("fp32", 64, False)}
    return [STUDIES[name].arm(flat(config.to_dict())) for config in configs]


@NAMES
def test_a_study_sweeps_over_the_arms_that_it_names_and_claims_are_about_those(name: str) -> None:
    study = STUDIES[name]
    arms = arms_of(name)
    more = {"FP4"} if name == "nf4_study" else set()  # which benchmarks/fp4.py adds
    assert sorted(arms) == sorted(set(study.order) - more)
    assert {arm for claim in study.claims for arm in (claim.first, claim.second)} <= set(study.order)


def test_one_budget_is_spent_on_whichever_weights() -> None:
    targets = yaml.safe_load((CONF / "experiment" / "which_weights.yaml").read_text())["hydra"]["sweeper"]["params"]
    widths = {"q": 576 + 576, "k": 576 + 192, "v": 576 + 192, "o": 576 + 576}  # SmolLM2's in + out
    given = OverridesParser.create().parse_override(f"x={targets['adapter.targets']}")
    for one in given.value().list:
        assert sum(widths[pattern[2]] * options["r"] for pattern, options in one.items()) == 9216
        assert all(options["alpha"] == 2 * options["r"] for options in one.values())


LOSSES = {1: [3.10, 3.20, 3.30], 64: [3.11, 3.19, 3.31], 2: [3.00, 3.10, 3.20], 4: [3.5, 3.0, 3.4]}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Finished runs of which only what is compared is there: q, v at four ranks, three seeds."""
    for (r, losses), seed in itertools.product(LOSSES.items(), range(3)):
        folder = tmp_path / f"r{r}-seed{seed}"
        folder.mkdir()
        keys: dict[str, Any] = {
            "adapter": {"targets": ["q_proj", "v_proj"], "r": r},
            "loop": {"seed": seed, "steps": 9},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(keys))
        told = {"status": "done", "eval": {"after": {"loss": losses[seed]}}, "trainable_parameters": 1000 * r}
        (folder / "summary.json").write_text(json.dumps({**told, "seconds": 60.0, "threads": 1}))
    return tmp_path


def test_a_table_has_the_arms_in_the_papers_order_with_differences_seed_by_seed(runs: Path) -> None:
    study = STUDIES["rank_study"]
    lines = section(study, *read(study, runs)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == [f"| q, v: r = {r}" for r in (1, 2, 4, 64)]
    assert "3.100 [2.852, 3.348] | best | 3 |" in lines[3]
    assert "+0.100 [+0.100, +0.100]" in lines[2]  # every seed by exactly so much, however far apart the seeds are
    assert "12 runs of 9 steps" in lines[-1]
    assert "not tried here (q, k, v, o: r = 1 and q, k, v, o: r = 64)" in "\n".join(lines)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (Claim("", "q, v: r = 2", "q, v: r = 1"), "shows"),
        (Claim("", "q, v: r = 1", "q, v: r = 2"), "the opposite shows"),
        (Claim("", "q, v: r = 4", "q, v: r = 2"), "is not decided"),
        (Claim("", "q, v: r = 1", "q, v: r = 64", same=True), "shows"),
        (Claim("", "q, v: r = 1", "q, v: r = 2", same=True), "does not show"),
        (Claim("", "q, v: r = 4", "q, v: r = 2", same=True), "is not decided"),
    ],
)
def test_a_finding_shows_only_where_the_interval_says_so(runs: Path, claim: Claim, said: str) -> None:
    arms, _ = read(STUDIES["rank_study"], runs)
    assert verdict(claim, arms).startswith(f"**{said}**")


def test_runs_of_two_settings_are_not_mixed_into_one_arm(runs: Path) -> None:
    config = runs / "r1-seed0" / "config.yaml"
    config.write_text(config.read_text().replace("steps: 9", "steps: 8"))
    with pytest.raises(SystemExit, match=r"loop\.steps"):
        read(STUDIES["rank_study"], runs)


def test_the_picture_is_xml_with_every_value(runs: Path) -> None:
    arms, _ = read(STUDIES["rank_study"], runs)
    drawn = experiments.picture(arms, "a < b")
    dots = ElementTree.fromstring(drawn).findall(".//{*}circle")
    assert len(dots) == 4 * (3 + 1)


def test_the_page_has_a_place_for_each_study_and_the_others_stay() -> None:
    page = experiments.PAGE.read_text()
    for name in STUDIES:
        changed = placed(page, name, experiments.BY, "NEW")
        assert changed.count("NEW") == 1
        assert placed(changed, name, experiments.BY, "NEW") == changed
    with pytest.raises(SystemExit, match="no place"):
        placed(page, "other", experiments.BY, "NEW")


def test_fp4_weights_are_rounded_as_our_own_layer_rounds_to_nf4() -> None:
    """The same code with ``nf4`` gives the bits that a run over NF4 computes with."""
    import torch

    from benchmarks.fp4 import rounded
    from lowrank.quant.nf4 import NF4Linear

    weight = torch.randn(96, 40, generator=torch.Generator().manual_seed(0))  # blocks run on over the rows
    assert torch.equal(rounded(weight, "nf4"), NF4Linear.from_dense(weight, None, double=False).dequantize())
    assert not torch.equal(rounded(weight, "fp4"), rounded(weight, "nf4"))
