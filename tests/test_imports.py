"""The floors of the package: who may import whom, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Ground: seen by all, sees itself alone. Layers: do not see one another. Uses: read what layers make.
GROUND = ("errors", "keys", "quant", "secrets", "foreign")
LAYERS = ("adapters", "models", "config", "data", "train", "eval")
SCHEMA = ("rules", "relations", "classes", "schema", "kinds")  # what config.py is made of
USES = ("export", "inspect", "report", "track", "fast", "compare")
# Of the composition.
PARTS = ("assemble", "evaluate", "record", "ledger", "session")
ROOTS = ("run", "commands", "cli", "compose")
COMPOSED = ("places", "given", "wording")  # what compose.py is made of
ANYWHERE = (*GROUND, "disk", "manifest", *LAYERS, *SCHEMA, *COMPOSED, "explain", *USES, *PARTS)

ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "keys": (),
    "secrets": (),
    "disk": ("secrets",),
    "foreign": ("errors", "disk"),
    "quant": ("errors", "keys"),
    "adapters": GROUND,
    "models": ("errors", "keys", "disk"),
    "data": ("errors", "keys", "disk"),
    "manifest": ("disk",),
    "train": ("errors", "keys", "disk", "manifest"),
    "eval": ("errors", "keys"),
    "config": ("errors", "secrets", *SCHEMA),
    "schema": (),
    "rules": ("errors",),
    "relations": (),
    "kinds": ("errors", "rules"),
    "classes": ("errors", "rules"),
    "export": (*GROUND, "disk", "adapters", "models", "data", "eval", "config"),
    "report": (*GROUND, "disk", "adapters", "models", "data", "eval", "config"),
    "compare": ("errors", "disk", "report", "record"),
    "inspect": (*GROUND, "adapters", "models", "data", "eval", "config"),
    "track": ("errors", "secrets", "classes", "schema", "train"),
    "fast": (*GROUND, "adapters", "models"),
    "assemble": ANYWHERE,
    "evaluate": ANYWHERE,
    "record": ("errors", "secrets", "foreign", "disk", "manifest", "models"),
    "ledger": ANYWHERE,
    "session": ANYWHERE,
    "places": ("errors",),
    "given": ("errors", "rules", "schema", "places"),
    "wording": ("errors", "rules", "schema"),
    "explain": ("errors", "config", *SCHEMA, "places"),
    "compose": ("errors", "secrets", "disk", "config", *SCHEMA, *COMPOSED),
    "run": (*ANYWHERE, "compose"),
    "testing": ANYWHERE,
    "sweep": (*ANYWHERE, "compose", "run"),
    "commands": (*ANYWHERE, "compose", "run"),
    "cli": (*ANYWHERE, "compose", "run", "commands", "testing"),
}


def sources() -> list[Path]:
    """Every Python file of the product: the package, the entry and Hydra's plug-in."""
    return [
        *sorted((ROOT / "lowrank").rglob("*.py")),
        ROOT / "train.py",
        *sorted((ROOT / "hydra_plugins").rglob("*.py")),
    ]


def unit(path: Path) -> str:
    """The folder, or the file, of lowrank that a source belongs to; its own name outside of it."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] != "lowrank":
        return relative.parts[0].removesuffix(".py")
    return relative.parts[1].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it; ``from a import b`` gives ``a.b``."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def of(path: Path, library: str) -> list[str]:
    return [name for name in imports(path) if name == library or name.startswith(f"{library}.")]


def own(path: Path) -> set[str]:
    """The units of lowrank that a file imports, its own left out."""
    parts = [name.split(".") for name in of(path, "lowrank")]
    return {names[1] for names in parts if len(names) > 1} - {unit(path)}


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PACKAGE = [path for path in sources() if path.parts[-2:] != ("lowrank", "__init__.py") and "lowrank" in path.parts]


@pytest.mark.parametrize("path", [p for p in sources() if (ROOT / "lowrank") in p.parents], ids=where)
def test_no_import_goes_up_a_floor_or_across_one(path: Path) -> None:
    if path == ROOT / "lowrank" / "__init__.py":
        return  # the public names: seen below to be loaded only when asked for
    assert unit(path) in ALLOWED, f"{where(path)}: which floor is it on?"
    assert own(path) <= set(ALLOWED[unit(path)])


def test_there_is_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in PACKAGE:
        graph.setdefault(unit(path), set()).update(own(path))

    def reach(start: str, seen: set[str]) -> set[str]:
        for following in graph.get(start, set()) - seen:
            seen |= {following}
            reach(following, seen)
        return seen

    assert [name for name in graph if name in reach(name, set())] == []


def test_hydra_is_imported_by_its_entry_its_composer_and_its_plug_in_alone() -> None:
    users = {where(path) for path in sources() if of(path, "hydra")}
    assert {name for name in users if not name.startswith("hydra_plugins/")} <= {"train.py", "lowrank/compose.py"}


def test_omegaconf_is_imported_there_and_by_the_schema_alone() -> None:
    users = {where(path) for path in sources() if of(path, "omegaconf")}
    allowed = {"train.py", "lowrank/compose.py", "lowrank/config.py"}
    assert {name for name in users if not name.startswith("hydra_plugins/")} <= allowed


def test_adapters_and_quant_see_of_transformers_only_conv1d_and_the_caches() -> None:
    for path in sources():
        if unit(path) in ("adapters", "quant"):
            for name in of(path, "transformers"):
                assert name == "transformers.pytorch_utils.Conv1D" or name.endswith("Cache"), where(path)


def test_bitsandbytes_is_imported_in_one_file() -> None:
    assert {where(path) for path in sources() if of(path, "bitsandbytes")} <= {"lowrank/quant/nf4.py"}


@pytest.mark.parametrize("library", ["peft", "trl", "accelerate", "transformers.Trainer", "transformers.trainer"])
def test_the_peers_are_never_imported_by_the_product(library: str) -> None:
    assert [where(path) for path in sources() if of(path, library)] == []


def test_the_loop_never_knows_an_adapter_a_data_set_or_a_model() -> None:
    for path in sources():
        if unit(path) == "train" and path.name != "train.py":
            assert not own(path) & {"adapters", "quant", "data", "models"}, where(path)


def test_what_reads_a_run_never_imports_the_loop() -> None:
    for path in sources():
        if unit(path) in ("eval", "export", "report", "compare"):
            assert "train" not in own(path), where(path)


def test_the_package_and_the_plug_in_load_no_torch_at_their_top() -> None:
    """``--help`` answers at once: torch is imported inside the functions that need it."""
    for path in [ROOT / "lowrank" / "__init__.py", ROOT / "train.py", *(ROOT / "hydra_plugins").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("torch", "transformers") for name in names), where(path)
