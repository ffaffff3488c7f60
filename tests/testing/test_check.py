"""``lowrank check`` and ``assert_conforms`` as somebody who writes an adapter meets them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli
import pytest
import torch

from lowrank.adapters import Adapter, Bottleneck, Full, LoRA
from lowrank.errors import ConfigError
from lowrank.testing import Conformance, Row, assert_conforms, conformance, options_of
from lowrank.testing.conformance import PROPERTIES

MINE = """
import torch
from torch import nn

from lowrank.adapters import Adapter
from lowrank.adapters.base import shape


class Gain(Adapter):
    def __init__(self, base, *, generator, size: float = 1.0):
        super().__init__()
        if size <= 0:
            raise ValueError(f"size: {size} is not allowed; a positive number.")
        self.size = size
        self.gain = nn.Parameter(torch.zeros(shape(base)[0]))

    def forward(self, base, x):
        return base(x) * (1 + self.size * self.gain.to(x.dtype))

    def merged(self, weight, bias):
        gain = 1 + self.size * self.gain.to(weight)
        return gain[:, None] * weight, None if bias is None else gain * bias


class LosesTheBias(Gain):
    def merged(self, weight, bias):
        return super().merged(weight, bias)[0], bias


class Breaks(Gain):
    def forward(self, base, x):
        return base(x) * (1 / 0)
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's own folder with a module of adapters in it."""
    (tmp_path / "my_adapters.py").write_text(MINE)
    return tmp_path


@pytest.fixture
def module(mine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The same, imported here."""
    monkeypatch.syspath_prepend(mine)
    yield importlib.import_module("my_adapters")
    del sys.modules["my_adapters"]


def check(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return cli.run("-m", "lowrank.cli", "check", *arguments, cwd=cwd)


def line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_a_class_in_the_users_own_folder_passes_with_a_line_for_each_property(mine: Path) -> None:
    done = check("my_adapters:Gain", "size=5e-1", cwd=mine)
    assert (done.returncode, done.stderr) == (0, "")
    title, head, *table = done.stdout.splitlines()
    assert title == "my_adapters.Gain(size=0.5)"
    assert head.split() == ["llama", "gpt2", "nf4"]
    for name, row in zip(PROPERTIES, table, strict=False):
        assert row.split("  ")[0] == name
        assert row.split()[-3:] == ["holds"] * 3
    assert done.stdout.endswith(f"{3 * len(PROPERTIES)} promises hold.\n")


def test_a_broken_promise_is_marked_with_its_property_and_the_exit_code_is_1(mine: Path) -> None:
    done = check("my_adapters:LosesTheBias", cwd=mine)
    assert (done.returncode, done.stderr) == (1, "")
    assert line(done.stdout, "merge").split() == ["merge", "holds", "FAIL", "FAIL"]  # Llama's layers have no bias
    assert "the merged weight differs from the wrapped call" in line(done.stdout, "FAIL merge on gpt2: transformer.h.0")
    assert line(done.stdout, "identity at start").split()[-3:] == ["holds"] * 3
    assert done.stdout.endswith(f"2 of {3 * len(PROPERTIES)} promises do not hold.\n")


def test_what_is_not_there_ends_with_2_and_the_nearest_name(mine: Path) -> None:
    done = check("my_adapters:Gian", cwd=mine)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "check: 'my_adapters.Gian' cannot be imported; my_adapters has no 'Gian'. Did you mean 'Gain'?\n"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["my_adapter:Gain"],
            "check: 'my_adapter:Gain' cannot be imported; no module 'my_adapter'. Did you mean 'my_adapters'?",
        ),
        (["my_adapters:nn"], "check: 'my_adapters.nn' is not allowed; a subclass of lowrank.adapters.base.Adapter."),
        (["my_adapters"], "check: 'my_adapters' is not allowed; a class as package.module:Class."),
        (
            ["my_adapters:Gain", "sice=2"],
            "check.sice: unknown key. Did you mean 'size'? Allowed: size, targets, exclude.",
        ),
        (["my_adapters:Gain", "size"], "check: 'size' is not an option; write OPTION=VALUE."),
        (["my_adapters:Gain", "size=[1"], "check.size: '[1' is not valid YAML."),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_each_wrong_word_is_one_sentence(words: list[str], sentence: str, module: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        options_of(words[0], words[1:])
    assert str(caught.value) == sentence


def test_options_are_read_as_yaml(module: Any) -> None:
    words = ["r=4", "alpha=1e-3", "rslora=true", "init=gaussian", "targets=[q_proj, v_proj]"]
    cls, options = options_of("lowrank.adapters:LoRA", words)
    assert cls is LoRA
    assert options == {"r": 4, "alpha": 1e-3, "rslora": True, "init": "gaussian", "targets": ["q_proj", "v_proj"]}


def test_an_option_out_of_range_is_what_the_constructor_says_of_it(module: Any) -> None:
    with pytest.raises(ConfigError, match=r"^adapter\.size: -1 is not allowed; a positive number\.$"):
        conformance(module.Gain, size=-1)


def test_an_exception_in_the_class_is_a_failure_with_its_place(module: Any) -> None:
    found = conformance(module.Breaks, targets="q_proj")
    number = 1 + MINE.splitlines().index("        return base(x) * (1 / 0)")
    row = next(row for row in found.rows if (row.property, row.base) == ("identity at start", "llama"))
    assert (row.verdict, row.detail) == (
        "FAIL",
        f"ZeroDivisionError: division by zero (my_adapters.py:{number}, in forward)",
    )
    assert "Traceback" not in str(found)


def test_in_a_test_suite_it_is_one_line(module: Any) -> None:
    before = torch.get_rng_state()
    assert_conforms(module.Gain, size=2.0)
    with pytest.raises(AssertionError, match="FAIL merge on gpt2"):
        assert_conforms(module.LosesTheBias)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_class_is_tried_on_every_kind_of_site_that_it_takes() -> None:
    assert bases(conformance(LoRA)) == ["llama", "gpt2", "nf4", "embedding"]
    found = conformance(Bottleneck, size=4)
    assert bases(found) == ["llama", "gpt2", "nf4", "llama blocks", "gpt2 blocks", "nf4 blocks"]
    assert found.passed
    assert "not promised: merge on llama, gpt2, nf4: Bottleneck is not a change of weight and bias" in str(found)


def test_a_base_that_the_method_does_not_go_on_refuses_and_passes() -> None:
    found = conformance(Full)
    assert found.passed
    assert {row.verdict for row in found.rows if row.base == "nf4"} == {"refuses"}
    assert "refuses on nf4: adapter: Full trains the base's own weights" in str(found)


def test_a_method_that_goes_nowhere_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'q_porj' matches no module"):
        conformance(LoRA, targets="q_porj")


def test_a_kind_of_site_that_there_is_not_is_an_error() -> None:
    class Misspelt(Adapter):
        sites = ("linaer",)

    with pytest.raises(ConfigError, match=r"Misspelt\.sites: 'linaer' is not allowed.*Did you mean 'linear'"):
        conformance(Misspelt)


def test_the_table_shows_each_failure_under_it() -> None:
    rows = (Row("merge", "llama", "holds"), Row("merge", "nf4", "FAIL", "off by 2"), Row("resume", "llama", "n/a"))
    shown = str(Conformance("Mine()", (*rows, Row("resume", "nf4", "holds")))).splitlines()
    assert shown == [
        "Mine()",
        "        llama  nf4",
        "merge   holds  FAIL",
        "resume  n/a    holds",
        "",
        "FAIL merge on nf4: off by 2",
        "1 of 3 promises do not hold.",
    ]


def bases(found: Conformance) -> list[str]:
    return list(dict.fromkeys(row.base for row in found.rows))
