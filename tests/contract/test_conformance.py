"""Every method in conf/adapter through the public kit: a new YAML is tested by being there."""

from __future__ import annotations

import fnmatch
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from lowrank import adapters
from lowrank.adapters import Adapter
from lowrank.adapters.plan import option_names
from lowrank.testing.bases import columns
from lowrank.testing.conformance import PROPERTIES, examined
from lowrank.testing.trial import Trial

FILES = sorted((Path(__file__).parents[2] / "conf" / "adapter").glob("*.yaml"))

# Beside the YAML's own options: one further trial for each way in which a method can compute otherwise.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"rslora": True},
        {"freeze_a": True},
        *({"init": name} for name in ("gaussian", "orthogonal", "pissa", "olora", "loftq", "zeros")),
    ],
    "dora": [{"rslora": True}],
    "ia3": [{"targets": "all-linear"}, {"targets": "all-linear", "feedforward": True}],
    "bottleneck": [{"targets": "all-linear", "activation": "tanh"}],
    "prefix": [{"hidden": 8}],
    "prompt": [{"init": "random"}, {"init": "text", "init_text": [5, 9, 2]}],
    "lokr": [{"r": 2}],
    "oft": [{"neumann": 5}],
}

# What a method does not promise, as globs over the cases' names; and where it does not go, with the words that say so.
NOT_PROMISED = (
    *("bottleneck*-merge", "prefix*-merge", "prompt*-merge"),
    *("prefix*-identity at start", "prompt*-identity at start"),
    # over 4-bit weights, or making them, the start is another approximation of the same weights
    *("lora init=pissa-nf4-identity at start", "lora init=olora-nf4-identity at start"),
    "lora init=loftq-*-identity at start",
)
REFUSES = {
    "full-nf4": "NF4 weights cannot train",
    "bitfit-llama": r"'\*.bias' matches no parameter",
    "lora init=loftq-nf4": "quantised already",
    "lora init=loftq-embedding": "this is Embedding",
}


@dataclass(frozen=True)
class Method:
    """A method as its YAML has it."""

    name: str
    cls: type[Adapter]
    targets: Any
    exclude: list[str]
    options: dict[str, Any]

    def trials(self, changes: dict[str, Any]) -> list[Trial]:
        """On every base, with some of the options, or the targets, changed; on embeddings too where it takes them."""
        chosen = {**self.options, **changes}
        bases = columns(self.cls, chosen.pop("targets", self.targets))
        more = [base for base in columns(self.cls) if base.name == "embedding"]
        return [Trial(self.cls, base, chosen, tuple(self.exclude)) for base in (*bases, *more)]


def read(path: Path) -> Method:
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    module, _, name = options.pop("_target_").rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    return Method(path.stem, cls, options.pop("targets"), options.pop("exclude"), options)


METHODS = [read(path) for path in FILES]


def trials() -> dict[str, Trial]:
    """Every method, with each of its variants, on each of its bases: ``lora init=pissa-nf4``."""
    made: dict[str, Trial] = {}
    for method in METHODS:
        for changes in ({}, *VARIANTS.get(method.name, [])):
            title = " ".join([method.name, *(f"{name}={value}" for name, value in changes.items())])
            made |= {f"{title}-{trial.base.name}": trial for trial in method.trials(changes)}
    return made


TRIALS = trials()
CASES = [f"{name}-{promise}" for name in TRIALS if name not in REFUSES for promise in PROPERTIES]


@pytest.mark.parametrize("case", CASES)
def test_a_method_keeps_its_promise(case: str) -> None:
    name, _, promise = case.rpartition("-")
    row = examined(TRIALS[name], promise)
    promised = not any(fnmatch.fnmatchcase(case, pattern) for pattern in NOT_PROMISED)
    assert row.verdict in (("holds", "n/a") if promised else ("not promised",)), f"{row.verdict}: {row.detail}"


@pytest.mark.parametrize("name", REFUSES)
def test_a_method_that_does_not_go_on_a_base_says_why(name: str) -> None:
    row = examined(TRIALS[name], "construction")
    assert row.verdict == "refuses"
    assert re.search(REFUSES[name], row.detail)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_yaml_names_an_adapter_its_targets_and_every_option_of_its_constructor(method: Method) -> None:
    assert issubclass(method.cls, Adapter)
    assert method.targets
    assert list(method.options) == option_names(method.cls)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_yaml_explains_every_key_where_it_stands(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        assert line.lstrip().startswith("#") or above.lstrip().startswith("#"), line


def test_no_method_is_without_a_yaml() -> None:
    exported = {getattr(adapters, name) for name in adapters.__all__}
    methods = {c for c in exported if isinstance(c, type) and issubclass(c, Adapter) and c is not Adapter}
    assert methods == {method.cls for method in METHODS}
