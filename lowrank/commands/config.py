"""``lowrank config``: explains keys of the configuration, or shows the whole of a command's."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence

from lowrank import compose
from lowrank.errors import ConfigError
from lowrank.explain.key import Composed, Explained, below, explain, roots
from lowrank.explain.peers import PEERS


def explained(words: Sequence[str]) -> Iterator[str]:
    """What is known of each key among ``words``, a table for a group; the others are overrides. Without a key: the
    groups. Raises ConfigError for a key that is not there."""
    keys = [word for word in words if "=" not in word and not word.startswith("~")]
    composed = compose.composed([word for word in words if word not in keys])
    for place, key in enumerate(keys or [""]):
        if place:
            yield ""
        inner = (
            [name for root in roots() for name in below(root, composed) or [root]] if not key else below(key, composed)
        )
        if inner:
            yield from table(key, [explain(name, composed) for name in inner], composed)
        else:
            yield str(explain(key, composed))


def table(key: str, rows: Sequence[Explained], composed: Composed) -> Iterator[str]:
    """A line a key: its value and meaning, cut into the terminal's width."""
    if key in composed.choices:
        names = ", ".join(sorted({f.stem for folder in composed.folders for f in (folder / key).glob("*.yaml")}))
        yield f"{key} = {composed.choices[key]} (of {names})"
        if key in PEERS:
            yield f"  peers  {', '.join(PEERS[key])}"
    path, value = max(len(row.path) for row in rows), min(24, max(len(row.value) for row in rows))
    width = max(40, shutil.get_terminal_size((120, 24)).columns - path - value - 6)
    for row in rows:
        first, *rest = textwrap.wrap(row.meaning, width) or [""]
        shown = row.value if len(row.value) <= value else f"{row.value[: value - 1]}…"
        yield f"  {row.path:<{path}}  {shown:<{value}}  {first}".rstrip()
        yield from (" " * (path + value + 6) + line for line in rest)


def shown(words: Sequence[str]) -> list[str]:
    """The configuration of ``python train.py WORDS`` as YAML, as its ``--cfg job`` has it."""
    wrong = [word for word in words if "=" not in word and not word.startswith("~")]
    if wrong:
        raise ConfigError(f"{wrong[0]}: not a valid override (no '=' in it). Write key=value.")
    return compose.shown(list(words)).splitlines()
