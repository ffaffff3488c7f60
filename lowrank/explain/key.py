"""A key of the configuration explained, from the one place where each of its facts is written.

Meaning, default and source: the comment, value and line of the YAML. Type: the schema. What is allowed: the rule that
refuses everything else. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lowrank.config import ROOT, key_error
from lowrank.errors import ConfigError, nearest
from lowrank.explain.options import ALLOWED
from lowrank.explain.peers import PEERS
from lowrank.places import Composed, Place, of_choice
from lowrank.relations import OWNERS, RELATIONS
from lowrank.rules import FLAG, RULES, SWEEP, Rule, show, unknown_key
from lowrank.schema import GROUPS, NESTED, OPEN, Sweep

OTHERS: dict[str, Rule] = {"plan": FLAG, **SWEEP}  # keys beside the groups
KINDS = {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "dict"}


@dataclass(frozen=True)
class Explained:
    path: str
    value: str
    meaning: str
    facts: tuple[tuple[str, str], ...]  # what it is called, and what it is

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.facts)
        lines = [f"  {name:<{width}}  {text}" for name, text in self.facts]
        head = f"{self.path} = {self.value}" if self.value else self.path
        return "\n".join([head, *([f"  {self.meaning}", ""] if self.meaning else []), *lines])


def explain(path: str, composed: Composed) -> Explained:
    """Raises ConfigError, with the nearest name, for a key that the configuration does not have."""
    value, there = find(path, composed.tree)
    place = composed.own.get(path)
    if not there and path not in RULES and path not in OTHERS:
        raise misspelt(path, composed)
    elsewhere = place or (None if there else in_another_choice(path, composed))
    facts = [
        ("type", kind(path, value)),
        ("allowed", allowed(path, composed)),
        ("default", default(place)),
        ("set by", source(path, composed, place)),
        ("must be", "; ".join(wanted for key, _, wanted in RELATIONS if key == path)),
        ("only with", only_with(path)),
        ("used by", used_by(path, composed)),
        ("paper", ", ".join(papers(path, elsewhere, composed))),
        ("peers", ", ".join(PEERS.get(path, ()))),
    ]
    return Explained(
        path,
        written(path, value, composed, place) if there else "",
        elsewhere.comment if elsewhere else "",
        tuple(fact for fact in facts if fact[1]),
    )


def written(path: str, value: Any, composed: Composed, place: Place | None) -> str:
    """A value as the YAML that sets it has it: off, not the false that a bare off becomes."""
    if place and place.value != "…" and not source(path, composed, place):
        return place.value
    return value if isinstance(value, str) else show(value)


def find(path: str, tree: Mapping[str, Any]) -> tuple[Any, bool]:
    node: Any = tree
    for name in path.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return None, False
        node = node[name]
    return node, True


def misspelt(path: str, composed: Composed) -> ConfigError:
    """Of a class's options the YAML's are looked at first: the class itself takes seconds to import."""
    where, _, key = path.rpartition(".")
    names = [name for name in composed.tree.get(where, {}) if not name.startswith("_")] if where in OPEN else []
    return unknown_key(path, names) if nearest(key, names) else key_error(path, dict(composed.tree))


def in_another_choice(path: str, composed: Composed) -> Place | None:
    """Where another choice of its group writes a key that this one does not have."""
    group = path.partition(".")[0]
    names = sorted(file.stem for folder in composed.folders for file in (folder / group).glob("*.yaml"))
    found = (of_choice(group, name, composed.folders).get(path) for name in names)
    return next((place for place in found if place), None)


def kind(path: str, value: Any) -> str:
    """As the schema has it; of a class's option, of the value in its YAML."""
    where, _, key = path.rpartition(".")
    cls = NESTED.get(where) or GROUPS.get(where) or (Sweep if where == "sweep" else None)
    declared = {f.name: str(f.type) for f in fields(cls)} if cls else {}
    name = "target" if key == "_target_" else key
    if name in declared and not (where in OPEN and name == "options"):
        return declared[name].replace(" | None", " or null")
    return next((text for one, text in KINDS.items() if type(value) is one), "")


def allowed(path: str, composed: Composed) -> str:
    group, _, key = path.partition(".")
    if path in RULES or path in OTHERS:
        return (RULES | OTHERS)[path].wanted
    if group == "adapter":
        return ALLOWED.get(f"{composed.choices.get(group)}.{key}", ALLOWED.get(key, ""))
    return "true or false" if find(path, composed.tree)[0] in (True, False) else ""


def default(place: Place | None) -> str:
    return f"{place.value}, in {place}" if place else ""


def source(path: str, composed: Composed, place: Place | None) -> str:
    """What set it last, where that is not its group's own file."""
    given = composed.given(path)
    last = composed.places.get(path)
    if given is not None:
        return f"the command line: {given}"
    return "" if last is None or last == place else str(last)


def only_with(path: str) -> str:
    group = path.partition(".")[0]
    owner = next((name for name in OWNERS if path == name or path.startswith(f"{name}.")), None)
    return " or ".join(f"{group}={choice}" for choice in OWNERS[owner]) if owner else ""


def used_by(path: str, composed: Composed) -> str:
    """The class whose option it is."""
    group, _, key = path.partition(".")
    fixed = {f"{group}.{name.name}" for name in fields(GROUPS[group])} if group in OPEN else set()
    return str(composed.tree[group].get("_target_", "")) if group in OPEN and key and path not in fixed else ""


def papers(path: str, place: Place | None, composed: Composed) -> list[str]:
    """The papers that its comment names; of a class's option else those of the method."""
    text = place.comment if place else ""
    if place and not re.search(r"arXiv", text) and used_by(path, composed):
        text = place.head
    return [f"https://arxiv.org/abs/{number}" for number in re.findall(r"\b(\d{4}\.\d{4,5})\b", text)]


def below(path: str, composed: Composed) -> list[str]:
    """The keys of a group, or of a mapping in it, in the order of its YAML; none of a key that is no group."""
    node, there = find(path, composed.tree)
    if not there or not isinstance(node, Mapping) or path in ("adapter.targets", "schedule.options"):
        return []
    keys: list[str] = []
    for name in node:
        inner = below(f"{path}.{name}", composed)
        keys += inner or [f"{path}.{name}"]
    return keys


def roots() -> Iterable[str]:
    return (name for name in ROOT if name != "experiment")
