"""README.md and docs/ are true: their commands run or compose, their Python runs, their tables are the code's.

What a fenced block is, is said by its info string. In the order of its page, in one folder a page that holds
my.jsonl, other.jsonl and my-model/ (a tiny model):

    bash test      every command runs and exits with 0
    bash           every command takes longer than seconds: its overrides are composed, its arguments parsed
    console        ``$ command``, and what it prints last
    python         runs; the blocks of a page share their names
    LANGUAGE FILE  is written to FILE
    text           a picture; nothing is done with it

Commands run in this process where nothing has to be set around them: importing torch takes seconds.
"""

from __future__ import annotations

import io
import itertools
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli import ROOT, SMALL, train, write_rows
from omegaconf import OmegaConf

import lowrank
from lowrank import cli, compose, errors
from lowrank.models import tiny
from lowrank.rules import RULES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass(frozen=True)
class Block:
    language: str
    role: str | None  # the second word of the info string
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(page.read_text())]


def commands(text: str) -> list[list[str]]:
    """The words of each line, without comments."""
    split = (shlex.split(line, comments=True) for line in text.splitlines())
    return [words for words in split if words]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_CACHE", str(folder))
        yield folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a page."""
    write_rows(tmp_path / "my.jsonl")
    write_rows(tmp_path / "other.jsonl")
    shutil.copytree(tiny.folder("tiny_llama"), tmp_path / "my-model")
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LOWRANK_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # train.py sets it, and this is its process here
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@PAGE
def test_every_command_runs_or_composes_and_all_python_runs(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        match block:
            case Block("bash", role, text):
                for words in commands(text):
                    if role != "test":
                        check(words)
                    else:
                        assert execute(words, monkeypatch) == 0, (words, capsys.readouterr())
            case Block("console", "", text):
                command, _, printed = text.removeprefix("$ ").partition("\n")
                capsys.readouterr()
                execute(shlex.split(command), monkeypatch)
                said = capsys.readouterr()
                assert (said.out + said.err).endswith(printed), command
            case Block("python", "", text):
                exec(compile(text, str(page), "exec"), names)
            case Block(_, file, text) if file:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(text)
            case Block(language):
                assert language == "text", f"{page.name}: a block of {language} that nothing tries"


def execute(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a command; its exit code."""
    if words[0] == "echo":
        said, _, words = " ".join(words).partition(" | ")[0], None, words[words.index("|") + 1 :]
        monkeypatch.setattr(sys, "stdin", io.StringIO(said.removeprefix("echo ") + "\n"))
    if words[:3] == ["PYTHONPATH=.", "python", "train.py"]:
        return train(*words[3:], cwd=Path.cwd(), PYTHONPATH=".").returncode
    try:
        if words[0] == "lowrank":
            cli.main(words[1:])
        else:
            assert words[:2] == ["python", "train.py"], words
            monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *words[2:]])
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def check(words: list[str]) -> None:
    """That a command would be understood: its overrides compose, its arguments parse, its make target is there."""
    match words:
        case ["python", "train.py", *overrides]:
            for one in jobs([o for o in overrides if o != "-m"]):
                compose.compose(one)
        case ["lowrank", *arguments]:
            parsed = cli.parser().parse_args(arguments)
            if arguments[0] == "inspect":
                compose.compose(parsed.overrides)
        case ["make", target, *rest]:
            recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert recipe, f"no target {target}"
            given = dict(word.split("=", 1) for word in rest).get("ARGS", "")
            for line in recipe[1].splitlines():
                if "train.py" in line:
                    compose.compose(shlex.split(line.partition("train.py")[2].replace("$(ARGS)", given)))
        case _:
            raise AssertionError(f"not a command of ours: {words}")


def jobs(overrides: list[str]) -> list[list[str]]:
    """The jobs of a sweep, each a list of overrides."""
    sweeps = [
        [f"{key}={one}" for one in (value.split(",") if value[:1] not in "[{" else [value])]
        for key, _, value in (override.partition("=") for override in overrides)
    ]
    return [list(job) for job in itertools.product(*sweeps)]


@PAGE
def test_no_block_is_left_over(page: Path) -> None:
    assert page.read_text().count("```") == 2 * len(blocks(page))


@PAGE
def test_every_command_within_a_sentence_is_understood(page: Path) -> None:
    for span in SPAN.findall(FENCE.sub("", page.read_text())):
        words = shlex.split(span) if span.startswith(("python train.py", "lowrank ", "make ")) else []
        if words[:2] == ["lowrank", "inspect"] or (words and words[0] != "lowrank" and "--help" not in words):
            check([word for word in words if not word.isupper() and word != "…"])
        elif words[:1] == ["lowrank"]:
            assert words[1] in cli.parser().format_help()


@PAGE
def test_every_file_and_link_that_is_named_is_there(page: Path) -> None:
    text = page.read_text()
    for file in re.findall(r"`((?:lowrank|conf|benchmarks)/[\w/]+\.\w+)`", text):
        assert (ROOT / file).is_file(), file
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in link or (page.parent / link).is_file(), link


@PAGE
def test_a_table_headed_by_a_file_quotes_lines_of_it(page: Path) -> None:
    for header, *rows in tables(page.read_text()):
        file = ROOT / header[-1].strip("`")
        if header[-1].endswith(".py`"):
            source = file.read_text()
            for row in rows:
                assert SPAN.findall(row[-1])[0] in source, row


def tables(text: str) -> list[list[list[str]]]:
    """Rows of cells, the header first."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for i, line in enumerate(table.splitlines()) if i != 1]
        for table in found
    ]


def section(page: str, title: str) -> str:
    text = (ROOT / "docs" / page).read_text()
    return re.split(r"^## ", text.partition(f"## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


GROUPS = [path.name for path in (ROOT / "conf").iterdir() if path.name not in ("hydra", "experiment", "config.yaml")]


@pytest.mark.parametrize("group", GROUPS)
def test_configuration_documents_every_key_its_default_and_what_is_allowed_and_no_other(group: str) -> None:
    written: dict[str, list[Any]] = {}
    for path in (ROOT / "conf" / group).glob("*.yaml"):
        for key, value in flat(OmegaConf.to_container(OmegaConf.load(path)), group):
            written.setdefault(key, []).append(value)
    _, *rows = tables(section("configuration.md", group))[0]
    documented = {row[0].strip("`"): row for row in rows}
    assert documented.keys() == written.keys()
    for key, values in written.items():
        _, default, allowed, meaning = documented[key]
        shown = [OmegaConf.to_container(OmegaConf.create(f"v: {span}"))["v"] for span in SPAN.findall(default)]
        assert all(value in shown for value in values if not isinstance(value, dict)), key  # ia3's targets, in words
        assert all(value in values for value in shown), key
        assert allowed == (RULES[key].wanted if key in RULES else allowed), key
        assert meaning


@pytest.mark.parametrize("group", GROUPS)
def test_configuration_names_every_choice_the_default_first(group: str) -> None:
    choices = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
    named = re.findall(rf"`{group}=(\w+)`", section("configuration.md", group).partition("|")[0])
    assert set(named) == (choices if len(choices) > 1 else set())
    defaults = OmegaConf.load(ROOT / "conf/config.yaml").defaults
    default = next(entry[group] for entry in defaults if group in entry)
    assert named[:1] == ([default] if named else [])


def flat(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value and key != "targets":
            yield from flat(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Any:
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "my.jsonl")
    more = ["model=tiny_llama", f"data.path={rows}", "loop.steps=2", "checkpoint.every=1", "loop.profile=1"]
    return lowrank.train([*SMALL, *more], folder / "run")


def test_runs_and_the_readme_list_every_file_of_a_run_directory_and_no_other(finished: Any) -> None:
    made = {f"{p.name}/" if p.is_dir() else p.name for p in finished.folder.iterdir() if not p.name.startswith(".")}
    made |= {"code.patch"}  # where code is not committed
    _, *rows = tables((ROOT / "docs/runs.md").read_text())[0]
    assert {row[0].strip("`") for row in rows} == made
    assert {path.name for path in (finished.folder / "adapter").iterdir()} <= set(SPAN.findall(rows[-1][1]))
    named = SPAN.findall(section("runs.md", "Checkpoints"))
    assert {path.name for path in (finished.folder / "checkpoints/step-00000002").iterdir()} <= set(named)
    [short] = [t for t in tables((ROOT / "README.md").read_text()) if "in the run directory" in t[0][0]]
    assert {name for row in short[1:] for name in SPAN.findall(row[0])} == made


def test_runs_documents_every_field_of_metrics(finished: Any) -> None:
    _, *rows = tables(section("runs.md", "metrics.jsonl"))[0]
    documented = {row[0].strip("`"): {"event", *SPAN.findall(row[1])} for row in rows}
    for row in finished.metrics:
        if row["step"]:  # the base's line, of step 0, has the scores too
            assert row.keys() == documented[row["event"]]


def test_runs_documents_every_field_of_the_summary(finished: Any) -> None:
    _, *rows = tables(section("runs.md", "summary.json"))[0]
    documented = {name: row[1] for row in rows for name in SPAN.findall(row[0])}
    assert documented.keys() - finished.summary.keys() == {"command"}  # of a run from the command line only
    assert finished.summary.keys() - documented.keys() == set()
    evaluation = set(SPAN.findall(documented["eval"])) - {"before", "after"}
    assert finished.summary["eval"]["after"].keys() == evaluation


def test_runs_has_the_exit_codes_of_the_errors() -> None:
    _, *rows = tables(section("runs.md", "Exit codes"))[0]
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert {int(row[0]) for row in rows} == {0, *(kind.exit_code for kind in kinds)}


def test_configuration_names_every_environment_variable_of_ours() -> None:
    named = {row[0].strip("`").partition("=")[0] for row in tables((ROOT / "docs/configuration.md").read_text())[0][1:]}
    sources = "".join(path.read_text() for path in [ROOT / "train.py", *(ROOT / "lowrank").rglob("*.py")])
    read = set(re.findall(r"\"(LOWRANK_\w+)\"", sources)) - {"LOWRANK_CAUSE", "LOWRANK_LAUNCHER"}  # between processes
    assert {name for name in named if name.startswith("LOWRANK_")} == read
