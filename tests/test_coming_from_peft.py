"""docs/coming-from-peft.md has every argument of LoraConfig, BitsAndBytesConfig and TrainingArguments, each once."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields

import pytest
from cli import ROOT
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments

from lowrank import compose
from lowrank.explain.key import explain
from lowrank.explain.peers import PEERS

PAGE = (ROOT / "docs/coming-from-peft.md").read_text()
THERE = {
    "LoraConfig": {field.name for field in fields(LoraConfig)},
    "BitsAndBytesConfig": set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"},
    "TrainingArguments": {field.name for field in fields(TrainingArguments)},
}


def rows() -> Iterator[tuple[str, str, str]]:
    """(Class.argument, what it is here, the note)."""
    for part in PAGE.split("\n## ")[1:]:
        title = part.partition("\n")[0]
        for line in re.findall(r"^\| `.*\|$", part, re.MULTILINE):
            there, here, note = (cell.strip() for cell in line.strip("|").split("|", 2))
            name = there.strip("`")
            yield (name if "." in name else f"{title}.{name}"), here, note


@pytest.mark.parametrize("name", THERE)
def test_every_argument_is_there_once_and_no_other(name: str) -> None:
    found = [there.partition(".")[2] for there, _, _ in rows() if there.startswith(f"{name}.")]
    assert sorted(found) == sorted(THERE[name])


def test_every_row_says_the_key_or_why_there_is_none() -> None:
    composed = compose.composed(["model=hf", "model.name=a", "quant=nf4", "track=wandb"])
    for there, here, note in rows():
        if here.startswith("`"):
            key, _, choice = here.strip("`").lstrip("+").partition("=")
            assert not choice or key == "optim.amsgrad" or compose.compose([f"{key}={choice}"]), there
            assert choice or key.startswith("hydra.") or str(explain(key, composed)), there
        else:
            assert here in ("not needed", "not there"), there
            assert note.startswith("because " if here == "not needed" else "instead "), there


def test_what_a_key_tells_of_the_peers_is_what_the_page_has() -> None:
    """A group that is chosen (quant=nf4) stands for itself; an option that no YAML sets, for its group."""
    written: dict[str, set[str]] = {}
    for there, here, _ in rows():
        if here.startswith("`"):
            key = here.strip("`").partition("=")[0]
            written.setdefault("optim" if key.startswith("+") else key, set()).add(there)
    assert written == {key: set(names) for key, names in PEERS.items()}


def test_the_scripts_arguments_are_explained_and_the_page_begins_with_the_common_ones() -> None:
    script = ast.parse(re.search(r"```python peft_sft\.py\n(.*?)```", PAGE, re.DOTALL)[1])  # type: ignore[index]
    calls = [node for node in ast.walk(script) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    used = {f"{c.func.id}.{k.arg}" for c in calls if c.func.id in THERE for k in c.keywords}  # type: ignore[attr-defined]
    assert len(used) > 10
    assert used <= {there for there, _, _ in rows()}
    assert [line for line in PAGE.splitlines() if line.startswith("## ")][:2] == [
        "## The same run",
        "## The common ones",
    ]
