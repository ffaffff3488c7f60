"""``lowrank config``: one place for what each key means, and every fact of it where a user asks."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli import ROOT, lowrank, run, train
from torch import Generator, nn

from lowrank import cli, compose
from lowrank.classes import find
from lowrank.errors import ConfigError
from lowrank.explain.key import below, explain, roots
from lowrank.explain.options import ALLOWED
from lowrank.explain.peers import PEERS
from lowrank.places import find_conf, of_choice
from lowrank.rules import RULES
from lowrank.schema import GROUPS

TABLE = (ROOT / "docs/configuration.md").read_text()
# The choice itself says what it is; what a pattern or a template is, a section of the page.
TOLD_ELSEWHERE = ("_target_", "kind", "targets", "template")


def explained(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    cli.main(["config", "explain", *words])
    return capsys.readouterr().out


def test_a_key_is_explained_with_all_that_is_known_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert explained("loop.max_grad_norm", capsys=capsys).splitlines() == [
        "loop.max_grad_norm = 0.3",
        "  Gradients longer than this are shortened to it; .inf measures the norm and leaves them.",
        "",
        "  type     float",
        "  allowed  a positive number (.inf measures without clipping)",
        f"  default  0.3, in conf/loop/default.yaml:{line_of('loop/default.yaml', 'max_grad_norm')}",
        "  peers    TrainingArguments.max_grad_norm",
    ]


def line_of(file: str, key: str) -> int:
    lines = (find_conf() / file).read_text().splitlines()
    return 1 + next(i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter.r", "adapter=dora"], "used by  lowrank.adapters.DoRA\n  paper    https://arxiv.org/abs/2402.09353"),
        (["adapter.rslora"], "paper    https://arxiv.org/abs/2312.03732"),
        (["optim.lr", "optim.lr=3"], "optim.lr = 3\n"),
        (["optim.lr", "optim.lr=3"], "set by   the command line: optim.lr=3"),
        (["optim.lr", "optim.lr=1", "experiment=demo"], "set by   the command line: optim.lr=1"),
        (["optim.lr", "experiment=demo"], "set by   conf/experiment/demo.yaml:"),
        (["optim.lr", "experiment=demo"], "default  5e-4, in conf/optim/adamw.yaml:"),
        (["optim.lr", "optim=sgd"], "default  0.1, in conf/optim/sgd.yaml:"),
        (["loop.steps"], "must be  exactly one of loop.steps and loop.epochs, the other null"),
        (["model.name"], "only with  model=hf"),
        (["quant.skip"], "peers      BitsAndBytesConfig.llm_int8_skip_modules"),
        (["loop.gradient_checkpointing"], "loop.gradient_checkpointing = off\n"),
        (["plan"], "allowed  true or false"),
        (["sweep.metric"], "type     str or null"),
        (["eval.generate.top_p"], "allowed  a number above 0, up to and including 1"),
        (["data.fields.response", "data=jsonl", "data.path=x"], "only with  data=jsonl or data=csv"),
    ],
)
def test_what_is_asked_of_a_key_is_answered(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in explained(*words, capsys=capsys)


def test_a_file_of_ones_own_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/mine.yaml").write_text("_target_: lowrank.adapters.LoRA\ntargets: q_proj\n# My rank.\nr: 3\n")
    found = explained("adapter.r", "adapter=mine", f"hydra.searchpath=[{tmp_path}]", capsys=capsys)
    assert found.startswith("adapter.r = 3\n  My rank.\n")
    assert f"default  3, in {tmp_path}/adapter/mine.yaml:4\n" in found


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("loop.max_grad_nrom", "loop.max_grad_nrom: unknown key. Did you mean 'max_grad_norm'? Allowed: steps,"),
        ("adapter.rr", "adapter.rr: unknown key. Did you mean 'r'? Allowed: targets, exclude, r, alpha,"),
        ("lop", "lop: unknown key. Did you mean 'loop'?"),
        ("optim.amsgrad", "optim.amsgrad: not set by this choice of optim; to set it write '+optim.amsgrad=…'."),
    ],
)
def test_a_misspelt_key_gets_the_nearest(key: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        explain(key, compose.composed([]))
    assert str(caught.value).startswith(said)


def test_a_group_lists_its_keys_and_no_key_at_all_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    listed = explained("adapter", "adapter=ia3", capsys=capsys)
    assert listed.startswith("adapter = ia3 (of adalora, bitfit,")
    assert re.findall(r"^  (adapter\.\w+)", listed, re.MULTILINE) == [
        *("adapter._target_", "adapter.targets", "adapter.exclude", "adapter.feedforward")
    ]
    every = re.findall(r"^  ([\w.]+) ", explained(capsys=capsys), re.MULTILINE)
    composed = compose.composed([])
    assert every == [key for root in roots() for key in below(root, composed) or [root]]
    assert {key.partition(".")[0] for key in every} == {*GROUPS, "plan", "sweep"}


def test_the_configuration_is_shown_as_hydra_shows_it() -> None:
    given = ("experiment=demo", "loop.seed=${data.seed}")
    assert lowrank("config", "show", *given).stdout == train("--cfg", "job", *given).stdout


def test_explaining_imports_no_torch_and_takes_a_moment() -> None:
    code = (
        "import sys, time; before = time.process_time(); from lowrank import cli;"
        "cli.main(['config', 'explain', 'adapter.r', 'adapter=dora']); cli.main(['config', 'show']);"
        "assert 'torch' not in sys.modules; print(time.process_time() - before, file=sys.stderr)"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr) < 2  # of a processor that others may share; alone it is a fifth of that


def test_what_reads_our_output_may_stop_reading() -> None:
    command = f"{sys.executable} -m lowrank.cli config explain | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    time.sleep(0)
    assert "Traceback" not in done.stderr


# One source: what a YAML's comment, a rule or a constructor says, docs/configuration.md and the explanation repeat.


def comments() -> dict[str, set[str]]:
    """Key → what the comment there says, in each choice of its group that has it."""
    found: dict[str, set[str]] = {}
    for file in find_conf().glob("*/*.yaml"):
        if file.parent.name in GROUPS:
            for key, place in of_choice(file.parent.name, file.stem, [find_conf()]).items():
                found.setdefault(key, set()).add(place.comment)
    return found


def plain(text: str) -> str:
    """Without Markdown, and without what a sentence begins and ends with."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "")
    return " ".join(text.split()).rstrip(".").casefold()


def documented() -> dict[str, list[str]]:
    """Key → default, allowed, meaning."""
    rows = re.findall(r"^\| `([\w.]+)` \|(.*)\|$", TABLE, re.MULTILINE)
    return {key: [cell.strip() for cell in cells.split("|")] for key, cells in rows if "." in key}


def test_the_documented_meaning_begins_with_the_comment_in_the_yaml() -> None:
    rows, wrong = documented(), []
    for key, texts in comments().items():
        if key.rpartition(".")[2] not in TOLD_ELSEWHERE and key in rows:
            meaning = re.sub(r"^(?:[a-z0-9_]+(?:,? [a-z0-9_]+)*): ", "", rows[key][-1]) if ": " in rows[key][-1] else ""
            starts = [plain(text) for text in texts]
            if not any(plain(one).startswith(start) for one in (rows[key][-1], meaning) for start in starts):
                wrong.append((key, rows[key][-1], texts))
    assert wrong == []


def test_the_documented_options_of_methods_may_be_what_their_constructors_accept() -> None:
    rows = documented()
    for option, wanted in ALLOWED.items():
        choice, _, name = option.rpartition(".")
        assert wanted in rows[f"adapter.{name}"][1] or wanted.split("one of ")[-1] in rows[f"adapter.{name}"][1], option
        if name not in ("target_r", "block_size", "neumann", "length", "init_text") and "prefix" not in choice:
            assert wanted.startswith(refused_by_a_constructor(choice, name)), option


def refused_by_a_constructor(choice: str, option: str) -> str:
    """The second half of what the class says of a value that no option can have."""
    files = [find_conf() / f"adapter/{choice}.yaml"] if choice else sorted((find_conf() / "adapter").glob("*.yaml"))
    for file in files:
        target = re.search(r"^_target_: (.*)$", file.read_text(), re.MULTILINE)
        if f"\n{option}:" in file.read_text() and target and file.stem not in ("prefix", "prompt"):
            cls: Any = find(target[1], "adapter")
            shared = cls.shared({"": (8, 8)}, generator=Generator())
            with pytest.raises(ValueError, match=f"^{option}: ") as caught:
                cls(nn.Linear(8, 8), generator=Generator(), **{**shared, option: object()})
            return str(caught.value).partition("is not allowed; ")[2].split(". Did")[0].rstrip(".")
    return ""


def test_every_documented_key_can_be_explained() -> None:
    made = [["model=hf", "model.name=a", "quant=nf4", "data=jsonl", "data.path=a", "track=wandb"]]
    made += [[f"adapter={file.stem}"] for file in (find_conf() / "adapter").glob("*.yaml")] + [["optim=adamw8bit"]]
    composed = [compose.composed(one) for one in [*made, ["optim=sgd"]]]
    for key in documented():
        found = [explain(key, one) for one in composed if key in RULES or known(key, one)]
        assert found, key
        assert key.endswith("_target_") or any(one.meaning for one in found), key


def known(key: str, composed: Any) -> bool:
    group, _, name = key.partition(".")
    return name in composed.tree.get(group, {})


def test_every_name_of_a_peer_belongs_to_a_key_that_is_there() -> None:
    composed = compose.composed(["model=hf", "model.name=a", "quant=nf4", "track=wandb"])
    for key in PEERS:
        assert key == "hydra.run.dir" or below(key, composed) or explain(key, composed), key
