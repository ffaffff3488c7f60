"""``lowrank …`` on a run directory: what is printed, exit codes, what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli import SMALL, lowrank, train, write_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank import cli
from lowrank import open as open_run
from lowrank.models import tiny

PROMPT = "Say number 3."
SAMPLING = ("--do-sample", "--max-new-tokens", "24", "--temperature", "0.7")


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """A finished run, trained through the command line, far enough to change what is generated."""
    folder = tmp_path_factory.mktemp("run") / "run"
    more = ("model=tiny_llama", f"data.path={rows}", "loop.steps=30", "optim.lr=1e-2", f"hydra.run.dir={folder}")
    done = train(*SMALL, *more)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert str(folder / "report.html") in done.stdout
    assert "step 30/30" in done.stderr
    return folder


def test_generate_prints_the_text_alone_and_the_same_one_for_a_seed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = lowrank("generate", str(folder), PROMPT, *SAMPLING, "--seed", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
    assert "###" not in done.stdout  # neither prompt nor template
    for seed in ("3", "4"):  # in another process, this one
        cli.main(["generate", str(folder), PROMPT, *SAMPLING, "--seed", seed])
        assert (capsys.readouterr().out == done.stdout) == (seed == "3")


def test_generate_takes_its_settings_from_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["generate", str(folder), PROMPT])
    greedy = capsys.readouterr().out.removesuffix("\n")
    assert len(greedy.encode()) <= 4  # eval.generate.max_new_tokens=4, and a token is a byte
    cli.main(["generate", str(folder), PROMPT, "--max-new-tokens", "8"])
    assert capsys.readouterr().out.strip().startswith(greedy.strip())


def test_generate_gives_the_tuned_text_of_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    instruction = sample["prompt"].split("### Instruction:\n")[1].split("\n\n")[0]
    block = sample["prompt"].partition("### Input:\n")[2].partition("\n\n")[0]
    cli.main(["generate", str(folder), instruction, "--input", block])
    assert capsys.readouterr().out == f"{sample['tuned']}\n"


def test_chat_answers_each_line_of_a_pipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = lowrank("chat", str(folder), stdin=f"{PROMPT}\nSay number 4.\n")
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 2
    cli.main(["generate", str(folder), PROMPT])
    assert answers[0] == capsys.readouterr().out.removesuffix("\n")


def test_evaluate_repeats_the_run_s_own_figures_and_measures_other_data(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["evaluate", str(folder)])
    mine = json.loads(capsys.readouterr().out)
    after = json.loads((folder / "summary.json").read_text())["eval"]["after"]
    assert mine == {name: value for name, value in after.items() if name != "rougeL_gain"}
    other = write_rows(tmp_path / "other.jsonl", 40)
    done = lowrank("evaluate", str(folder), "data=jsonl", f"data.path={other}", "data.fields.response=output")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == mine.keys()
    assert json.loads(done.stdout)["loss"] != mine["loss"]


def test_evaluate_refuses_what_is_not_evaluation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["evaluate", str(folder), "optim.lr=1"]) == 2
    assert capsys.readouterr().err == "optim.lr=1: only data and eval may differ from the run's.\n"
    assert refused(["evaluate", str(folder), "data.limt=1"]) == 2
    assert capsys.readouterr().err.startswith("data.limt: unknown key. Did you mean 'limit'?")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # which PEFT reads
def test_an_exported_adapter_is_what_peft_loads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["export", str(folder), str(tmp_path / "peft")])
    assert capsys.readouterr().out == f"{tmp_path / 'peft'}\n"
    base = AutoModelForCausalLM.from_pretrained(tiny.folder("tiny_llama"))
    untouched, ours = logits(base), logits(open_run(folder).model)
    theirs = logits(PeftModel.from_pretrained(base, tmp_path / "peft").eval())
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - untouched).abs().max() > 1e-2
    assert refused(["export", str(folder), str(folder)]) == 2  # not over a run
    assert "not empty" in capsys.readouterr().err


def test_a_merged_folder_is_a_plain_transformers_model(folder: Path, tmp_path: Path) -> None:
    done = lowrank("merge", str(folder), str(tmp_path / "merged"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("merged 14 sites\n")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(open_run(folder).model)).abs().max() <= 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").decode([72, 105]) == "Hi"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[256, 72, 101, 108, 108, 111]])).logits


def test_inspect_data_marks_what_is_learnt(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["model=tiny_llama", "data=jsonl", f"data.path={rows}", "data.fields.response=output", "--limit", "1"]
    cli.main(["inspect", "data", *given])
    head, *text = capsys.readouterr().out.splitlines()
    assert head.startswith("row 1: ")
    assert text[:8] == [
        *("<|bos|>### Instruction:", "Say number 0.", "", "### Input:", "list 0", ""),
        *("### Response:", "⟦0, or 1<|eos|>⟧"),
    ]


def test_inspect_plan_shows_every_site(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["inspect", "plan", "model=tiny_gpt2", "adapter.targets={c_attn:{r:8}}"])
    header, *sites, totals = capsys.readouterr().out.splitlines()
    assert header.split() == ["path", "kind", "shape", "adapter", "parameters"]
    assert [line.split()[:3] for line in sites] == [
        [f"transformer.h.{i}.attn.c_attn", "Conv1D", "192×64"] for i in range(2)
    ]
    assert totals.startswith("2 rows, 4,096 trainable parameters")


def test_report_is_written_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    cli.main(["report", str(folder)])
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_bytes() == page


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate", "export", "merge", "report"])
def test_what_is_no_run_directory_is_said(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"generate": ["hello"], "export": [str(tmp_path / "out")], "merge": [str(tmp_path / "out")]}
    arguments = [command, str(tmp_path), *more.get(command, [])]
    assert refused(arguments) == 2
    assert capsys.readouterr().err == f"{tmp_path}: not a run directory (no config.yaml there).\n"
    assert list(tmp_path.iterdir()) == []


def refused(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)
