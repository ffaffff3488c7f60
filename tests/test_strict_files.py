"""A user's own files of configuration, and command lines: what is wrong in them is said with the file and the line."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import ROOT, environment, train

from lowrank import compose
from lowrank.errors import ConfigError
from lowrank.places import check_numbers, find_conf
from lowrank.schema import GROUPS


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose.compose([*overrides])
    return str(caught.value)


def written(folder: Path, file: str, text: str | bytes) -> str:
    """A file of configuration, and the override by which its folder is found."""
    path = folder / file
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"hydra.searchpath=[{folder}]"


HEAD = "# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{HEAD}loop:\n  stepss: 3\n", "loop.stepss: unknown key. Did you mean 'steps'? …Set in FILE:3."),
        (
            f"{HEAD}loop:\n  steps: 3e3\n",
            "loop.steps: 3000.0 is not allowed; a positive integer, … Set in FILE:3.",
        ),
        (f"{HEAD}loop:\n  fast: 'true'\n", "loop.fast: 'true' is not allowed; true or false. Set in FILE:3."),
        (f"{HEAD}lop:\n  steps: 3\n", "lop: unknown key. Did you mean 'loop'? …Set in FILE:2."),
        (f"{HEAD}loop:\n  epochs: 3\n", "loop.steps: 100 is not allowed; exactly one of loop.steps and loop.epochs,…"),
        ("# @package foo.bar\nloop:\n  steps: 3\n", "foo: unknown key. …Set in FILE:1."),
        ("loop:\n  steps: 3\n", "experiment: the first line of an experiment's file must be '# @package _global_'."),
        ("- a\n", "experiment: the first line of an experiment's file must be '# @package _global_'."),
        (f"{HEAD}loop:\n  steps: 3\n  steps: 4\n", "not valid YAML: found duplicate key steps…x.yaml…"),
        (f"{HEAD}loop:\n\tsteps: 3\n", "not valid YAML: found character '\\t' that cannot start any token…x.yaml…"),
        (f"{HEAD}loop: !!python/object/apply:os.system [ls]\n", "not valid YAML: could not determine a constructor…"),
        (b"\xff\xfe\x00", "FILE: not valid YAML: …"),
        (
            f"{HEAD}loop:\n  steps: ${{loop.seed}}\n  seed: ${{loop.steps}}\n",
            "loop.s…: Recursive interpolation…",
        ),
        (
            f"{HEAD}defaults:\n  - override /modle: hf\n",
            "experiment/x.yaml: defaults: 'modle' is no group. Did you…",
        ),
        (f"{HEAD}defaults:\n  - override /model: lama\n", "model: 'lama' is not a choice…"),
        (f"{HEAD}defaults:\n  - nowhere\n", "experiment/x.yaml: defaults: no file 'experiment/nowhere.yaml' in…"),
        (f"{HEAD}defaults:\n  - x\n", "configuration: nested too deeply, or a file that names itself in its own…"),
        (f"{HEAD}defaults: 3\n", "experiment/x.yaml: defaults must be a list (got int)."),
        (f"{HEAD}hydra:\n  rnu: 3\n", "hydra.rnu: unknown key. Set in experiment/x.yaml."),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path: Path, text: str | bytes, said: str) -> None:
    found = refusal(written(tmp_path, "experiment/x.yaml", text), "experiment=x")
    place = 0
    for part in said.replace("FILE", f"{tmp_path}/experiment/x.yaml").split("…"):
        assert part in found[place:], found
        place = found.index(part, place) + len(part)
    assert said.endswith("…") or place == len(found)


def test_the_command_line_is_no_file_s_fault(tmp_path: Path) -> None:
    place = written(tmp_path, "experiment/x.yaml", f"{HEAD}loop:\n  steps: 3\n")
    assert refusal(place, "experiment=x", "loop.steps=0").endswith("a positive integer, or null.")
    assert refusal("loop.steps=0").endswith("a positive integer, or null.")


@pytest.mark.parametrize(("number", "read"), [("010", 8), ("1:30", 90), ("-017", -15)])
def test_a_number_that_yaml_takes_for_another_is_refused(tmp_path: Path, number: str, read: int) -> None:
    written(tmp_path, "loop/mine.yaml", f"seed: {number}\n")
    with pytest.raises(ConfigError) as caught:
        compose.understood([f"--config-dir={tmp_path}", "loop=mine"])
    assert str(caught.value).startswith(f"{tmp_path}/loop/mine.yaml:1: YAML reads {number} as {read}.")
    check_numbers(find_conf(), [*GROUPS, "experiment"])  # there is none in ours


def test_a_refusal_removes_no_folder_that_it_was_called_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_OUTPUTS", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    compose.discard(Path(""))
    assert (tmp_path / "here").is_dir()


# As a command.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "adapter.r=interval(1,2)"], "interval(…): only with hydra/sweeper=optuna"),
        (["-m", "hydra.run.dir=a,b"], "hydra.run.dir: 'a,b' is several values; one is."),
        (
            ["-m", "loop.steps=0", "hydra/launcher=isolatd"],
            "hydra/launcher: 'isolatd' is not a choice. Did you mean",
        ),
        (["--config-name=nowhere"], "--config-name: no file 'nowhere.yaml' in the configuration's folders."),
    ],
)
def test_a_wrong_command_line_starts_nothing(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = train(*arguments, cwd=tmp_path, LOWRANK_OUTPUTS=str(tmp_path / "outputs"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(said)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_names_the_job_and_the_file_that_is_wrong_and_starts_none(tmp_path: Path) -> None:
    written(tmp_path / "conf", "experiment/x.yaml", f"{HEAD}loop:\n  stepss: 3\n")
    given = ("-m", f"--config-dir={tmp_path}/conf", "model=tiny_llama", "experiment=demo,x")
    done = train(*given, cwd=tmp_path, LOWRANK_OUTPUTS=str(tmp_path / "outputs"))
    assert (done.returncode, done.stdout) == (2, "")
    first, last = done.stderr.splitlines()
    assert first.startswith("job 2 (experiment=x): loop.stepss: unknown key. Did you mean 'steps'? Allowed: ")
    assert first.endswith(f". Set in {tmp_path}/conf/experiment/x.yaml:3.")
    assert last == "No job was started."
    assert not (tmp_path / "outputs").exists()


def without_override() -> None:
    """In a child: gives up root's right to read what nobody may."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_folder_of_configuration_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    written(tmp_path / "conf", "experiment/x.yaml", HEAD)
    (tmp_path / "conf/experiment/x.yaml").chmod(0)
    command = [sys.executable, str(ROOT / "train.py"), f"--config-dir={tmp_path}/conf", "experiment=x"]
    give_up = without_override if os.geteuid() == 0 else None
    done = subprocess.run(
        command, env=environment(), cwd=tmp_path, preexec_fn=give_up, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, f"{tmp_path}/conf/experiment/x.yaml: Permission denied.\n")
