"""Where the configuration's values are written: the file and line of each key, and what the comment there says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import yaml  # type: ignore[import-untyped]

from lowrank.errors import ConfigError

PACKAGE = re.compile(r"\A(?:\s*#.*\n)*?\s*#\s*@package\s+(\S+)")
LOOKS = re.compile(r"[-+]?(0[0-7_]*[0-7]|[1-9][0-9_]*(:[0-5]?[0-9])+)")  # integers to YAML 1.1: octal, sexagesimal
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Place:
    file: Path
    line: int
    value: str  # as it is written
    comment: str  # behind the value, or else above the key
    head: str  # what the file says of itself in its first lines

    def __str__(self) -> str:
        ours = find_conf().parent
        return f"{self.file.relative_to(ours) if ours in self.file.parents else self.file}:{self.line}"


@dataclass(frozen=True)
class Composed:
    """A composed configuration, and what it was made of."""

    tree: Mapping[str, Any]
    choices: Mapping[str, Any]  # group → choice
    folders: Sequence[Path]  # of YAML, in the order in which they are searched
    overrides: Sequence[str]  # of the command line

    @cached_property
    def places(self) -> dict[str, Place]:
        return places(self.choices, self.folders)

    @cached_property
    def own(self) -> dict[str, Place]:
        """The same without what experiments change."""
        return places({**self.choices, "experiment": None}, self.folders)

    def given(self, path: str) -> str | None:
        """The last override of the command line that sets a key."""
        keys = {text.lstrip("+~").partition("=")[0]: text for text in self.overrides}
        parents = [path.rsplit(".", n)[0] for n in range(path.count("."))]
        return next((keys[one] for one in parents if one in keys), None)


def places(choices: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Place]:
    """Dotted key → the last file that sets it, of those that ``choices`` (group → choice) are made of.

    ``folders``: where files are looked for, the first that has one wins, as Hydra does it.
    """
    order = [(group, choice) for group, choice in choices.items() if group != "experiment" and "/" not in group]
    order += [("", "config"), ("experiment", choices.get("experiment"))]
    found: dict[str, Place] = {}
    for group, choice in order:
        for name in choice if isinstance(choice, list) else [choice]:
            found |= of_choice(group, str(name), folders)
    return found


def of_choice(group: str, name: str, folders: Sequence[Path], seen: tuple[Path, ...] = ()) -> dict[str, Place]:
    """The keys of a group's file, after those of the files that its defaults list names."""
    relative = Path(group) / f"{name}.yaml"
    file = next((folder / relative for folder in folders if (folder / relative).is_file()), None)
    if file is None or file in seen:
        return {}
    found: dict[str, Place] = {}
    for entry in of_defaults(file):
        found |= of_choice(group, entry, folders, (*seen, file))
    return found | of_file(file, group)


def of_defaults(file: Path) -> Iterator[str]:
    """The other files of its own group that a file begins with."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=LOADER)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            yield from (one.value for one in value.value if isinstance(one, yaml.ScalarNode) and one.value != "_self_")


def of_file(file: Path, group: str) -> dict[str, Place]:
    """Dotted key → its place, for every key of one file, its package taken into account."""
    text = file.read_text(encoding="utf-8")
    package = PACKAGE.match(text)
    prefix = {"_global_": "", "_group_": group}.get(package[1], package[1]) if package else group
    lines = text.splitlines()
    head = " ".join(line.lstrip("# ") for line in leading(lines) if "@package" not in line)
    node = yaml.compose(text, Loader=LOADER)
    found = {}
    for path, key, value in keys(node, prefix):
        line = key.start_mark.line
        written = text[value.start_mark.index : value.end_mark.index].strip() if flat(value) else "…"
        found[path] = Place(file, line + 1, written, comment(lines, line), head)
    for depth in range(1, prefix.count(".") + 2) if found and prefix not in ("", group) else ():
        parent = ".".join(prefix.split(".")[:depth])
        found.setdefault(parent, Place(file, 1, "…", "", head))  # the line that names the package
    return found


def flat(value: Any) -> bool:
    """Whether a value stands on its key's own line."""
    return isinstance(value, yaml.ScalarNode) or bool(value.flow_style)


def leading(lines: Sequence[str]) -> list[str]:
    """The comment that a file begins with; not the one that belongs to its first key, if that is all there is."""
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return list(lines[:end])


def keys(node: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, the key's own node, its value's)."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}.{key.value}" if prefix else str(key.value)
            yield path, key, value
            yield from keys(value, path)


def comment(lines: Sequence[str], line: int) -> str:
    """What stands behind a key's value, or else directly above it at its own depth."""
    if behind := re.search(r"\s#\s?(.*)$", lines[line]):
        return behind[1].strip()
    depth = len(lines[line]) - len(lines[line].lstrip())
    above: list[str] = []
    for text in reversed(lines[:line]):
        if not re.match(rf"\s{{{depth}}}#", text):
            break
        above.insert(0, text.strip().removeprefix("#").strip())
    return " ".join(above)


def check_numbers(folder: Path, groups: Sequence[str]) -> None:
    """Raises ConfigError for a number in a user's folder of configuration that YAML reads as another: 010 is 8."""
    files = [*folder.glob("*.yaml"), *(file for group in groups for file in sorted((folder / group).rglob("*.yaml")))]
    for file in files:
        try:
            tokens = list(yaml.scan(file.read_text(encoding="utf-8"), Loader=LOADER))
        except (yaml.YAMLError, UnicodeError, OSError, RecursionError):
            continue  # said when it is read
        for token in tokens:
            if isinstance(token, yaml.ScalarToken) and token.plain and LOOKS.fullmatch(token.value):
                read = yaml.load(token.value, Loader=LOADER)
                line = token.start_mark.line + 1
                raise ConfigError(
                    f"{file}:{line}: YAML reads {token.value} as {read}. Write {read}, or quote it to have a text."
                )


def placed(error: ConfigError, composed: Composed) -> ConfigError:
    """``error`` with the file and line that set its key, where that is an experiment's or a user's file and not the
    command line."""
    key = str(error).partition(": ")[0]
    if " Set in " in str(error) or composed.given(key) is not None:
        return error
    try:
        place = composed.places.get(key)
    except (OSError, ValueError, yaml.YAMLError):
        return error
    ours = place is not None and find_conf() in place.file.parents and "experiment" not in place.file.parts
    return error if place is None or ours else ConfigError(f"{error} Set in {place}.")


def find_conf() -> Path:
    """conf/ beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    beside = package.parent / "conf"
    return beside if (beside / "config.yaml").is_file() else package / "conf"


def frames(error: BaseException) -> Iterator[FrameType]:
    """From where an exception was caught to where it was raised."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def within(frame: FrameType, folder: Path) -> bool:
    return folder in Path(frame.f_code.co_filename).parents


def met_with(error: BaseException, library: Path, name: str) -> Any:
    """What ``library`` called ``name`` when it met an error: the file it was reading, the override it carried out."""
    found = [frame for frame in frames(error) if within(frame, library) and name in frame.f_locals]
    return found[-1].f_locals[name] if found else None
