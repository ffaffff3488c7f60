"""Completion, as a real shell does it, from a script that starts no Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowrank import cli, compose
from lowrank.commands.completions import completions
from lowrank.schema import GROUPS

ASK = """
source "$1"
while IFS= read -r line; do
    COMP_LINE=$line COMP_POINT=${#line} COMPREPLY=()
    _lowrank 2> /dev/null
    printf '%s\\x1f' "${COMPREPLY[@]}"
    echo
done
"""
CASES = {
    "lowrank insp": ["inspect"],
    "lowrank inspect ": ["data", "plan", "adapter"],
    "lowrank inspect plan ada": ["adapter=", "adapter."],
    "lowrank inspect plan adapter.al": ["adapter.alpha="],
    "lowrank inspect plan adapter=lo": ["loha", "lokr", "lora"],
    "lowrank plan loop.fast=": ["true", "false"],
    "lowrank plan +quant=nf": ["nf4"],
    "lowrank plan model=tiny_llama data.path=my": ["my run", "my.jsonl"],
    "lowrank plan --budg": ["--budget"],
    "lowrank plan --budget 24GiB quant=n": ["nf4", "none"],
    "lowrank plan --budget mod": [],
    "lowrank generate m": ["my run"],
    "lowrank generate out/": ["out/run"],
    "lowrank generate out/run ": [],
    "lowrank merge out there --to ": ["dense", "nf4"],
    "lowrank merge --to dense o": ["out"],
    "lowrank resume out loop.st": ["loop.steps="],
    "lowrank combine there m": ["my run"],
    "lowrank completions ": ["bash", "zsh"],
    "lowrank plan * [a 'b c' $(false) quant=nf": ["nf4"],
    "lowrank nothing ": [],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my run").mkdir()
    (tmp_path / "my.jsonl").touch()
    (tmp_path / "out" / "run").mkdir(parents=True)
    return tmp_path


def script(folder: Path, shell: str) -> Path:
    path = folder / f"script.{shell}"
    path.write_text(completions(cli.parser(), compose.find_conf(), shell))
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_folders_and_overrides(folder: Path) -> None:
    made = script(folder, "bash")
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "ask", str(made)],
        **{"input": "\n".join(CASES) + "\n", "capture_output": True, "text": True, "cwd": folder, "check": True},
    )
    each = (time.monotonic() - began) / len(CASES)
    found = [[word for word in line.split("\x1f") if word] for line in done.stdout.splitlines()]
    assert dict(zip(CASES, map(sorted, found), strict=True)) == {line: sorted(words) for line, words in CASES.items()}
    assert done.stderr == ""
    assert each < 0.3


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script_and_finds_the_same_words(folder: Path) -> None:
    made = script(folder, "zsh")
    ask = f"compdef() {{ }}; source {made}; _lowrank_next inspect plan; print $wanted; "
    ask += "_lowrank_next merge out there --to; print $wanted; _lowrank_next generate; print $wanted; "
    ask += "_lowrank_values adapter; print $values; _lowrank_next completions; print $wanted"
    done = subprocess.run(["zsh", "-f", "-c", ask], capture_output=True, text=True, check=True)
    override, to, run, adapters, shells = done.stdout.splitlines()
    assert (override, to, run, shells) == ("@override", "dense|nf4", "@folder", "bash|zsh")
    assert {"lora", "dora"} <= set(adapters.split())


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_every_command_group_and_key_is_in_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["completions", shell])
    text = capsys.readouterr().out
    for name in GROUPS:
        assert f" {name}." in text
    for key in ("adapter.r=", "eval.generate.limit=", "track._target_="):
        assert f" {key}" in text
    assert "_base" not in text


def test_it_needs_no_torch() -> None:
    code = "import sys; from lowrank import cli; cli.main(['completions', 'bash']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_help_of_every_command_has_an_example() -> None:
    [commands] = [a for a in cli.parser()._actions if a.choices and isinstance(a.choices, dict)]
    for name, command in commands.choices.items():
        assert f"examples:\n  lowrank {name} " in command.format_help()
