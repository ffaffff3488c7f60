"""The thirteen errors of docs/runs.md's promise, each as a user meets it: a command, its exit code, and its one block.

``pytest tests/test_errors_cli.py -s -m "slow or not slow"`` prints all of them. What is slow here has a fast test in
process beside it: tests/session (8), tests/record (9, 13), tests/test_out_of_memory.py (10), tests/test_inspect_cli.py
(11).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli import ROOT, SMALL, environment, lowrank, train, write_rows
from safetensors.torch import load_file, save_file

import lowrank as library
from lowrank.models import tiny

pytestmark = pytest.mark.usefixtures("cache")
STEPS = ("loop.steps=3", "checkpoint.every=1", "checkpoint.keep=3", "eval.before=false", "eval.generate.limit=0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """A folder that holds a model, and a run on it with three checkpoints."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny.folder("tiny_llama"), home / "model")
    library.train([*SMALL, *STEPS, "model=hf", f"model.name={home}/model", f"data.path={rows}"], home / "run")
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil; the model stays where the run knows it."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run")).parent


def told(done: subprocess.CompletedProcess[str], number: int, code: int) -> str:
    """What was said after what had been announced: one block, no traceback."""
    announced = re.compile(r"(tiny_llama|llama|hf|/\S+) \(.*|data: \S+, \d+ examples.*")
    said = "".join(line for line in done.stderr.splitlines(keepends=True) if not announced.match(line))
    print(f"error {number}: exit {done.returncode}\n{said}")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return said


def refused(number: int, code: int, tmp_path: Path, *arguments: str) -> str:
    """Of a run that must end before its first step, and so leave nothing."""
    names = {argument.split("=")[0] for argument in arguments}
    small = [argument for argument in SMALL if argument.split("=")[0] not in names]
    done = train("model=tiny_llama", *small, *arguments, cwd=tmp_path, LOWRANK_OUTPUTS=str(tmp_path / "outputs"))
    assert done.stdout == ""
    assert not (tmp_path / "outputs").exists()
    return told(done, number, code)


def test_1_a_target_that_matches_nothing_is_refused_though_another_matches(tmp_path: Path, rows: Path) -> None:
    said = refused(1, 2, tmp_path, f"data.path={rows}", "adapter.targets=[v_proj,q_porj]")
    assert said == "adapter.targets: 'q_porj' matches no module. Nearest: 'q_proj' (2 modules).\n"


@pytest.mark.parametrize("override", ["optim.lrr=1", "+optim.lrr=1"])
def test_2_an_unknown_key_is_named_with_the_nearest_and_the_allowed(tmp_path: Path, override: str) -> None:
    said = refused(2, 2, tmp_path, "data.path=none.jsonl", override)
    assert said.startswith("optim.lrr: unknown key. Did you mean 'lr'? Allowed: lr, weight_decay, groups, in_")
    assert said.count("\n") == 1


def test_3_a_value_out_of_range_is_named_with_what_is_allowed(tmp_path: Path) -> None:
    assert refused(3, 2, tmp_path, "data.path=none.jsonl", "adapter.r=0") == (
        "adapter.r: 0 is not allowed; a positive integer.\n"
    )


def test_4_a_missing_column_is_named_with_the_nearest(tmp_path: Path, rows: Path) -> None:
    assert refused(4, 4, tmp_path, f"data.path={rows}", "data.fields.response=ouput") == (
        "data.fields.response: no column 'ouput' in rows.jsonl (has: instruction, input, output). "
        "Did you mean 'output'?\n"
    )


def test_5_a_line_that_is_not_json_is_shown_with_its_number(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl")
    lines = path.read_text().splitlines()
    lines[6] = '{"instruction": "a", "input" "b"}'
    path.write_text("\n".join(lines))
    said = refused(5, 4, tmp_path, f"data.path={path}")
    assert said.startswith("bad.jsonl:7: not valid JSON (column 30).\n" + f"  {lines[6]}\n")


def test_6_examples_cut_to_nothing_are_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    long = {"instruction": "Say " + "very " * 30 + "much.", "input": "", "output": "much"}
    path.write_text(path.read_text() + f"{json.dumps(long)}\n" * 2)
    held_out = write_rows(tmp_path / "held.jsonl")
    given = (f"data.path={path}", f"data.eval_path={held_out}", "data.max_length=128")
    assert refused(6, 4, tmp_path, *given) == (
        "data: 2 of 22 examples have no target token after truncation to 128 (first: row 21). "
        "Raise data.max_length or set data.on_empty=drop.\n"
    )


def test_7_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_step_before(tmp_path: Path, rows: Path) -> None:
    folder = tmp_path / "run"
    small = [argument for argument in SMALL if not argument.startswith("eval")]
    diverging = ("optim.lr=1e20", "loop.accumulate=2", "loop.steps=5", "checkpoint.every=1")
    more = (f"data.path={rows}", "eval.before=false", f"hydra.run.dir={folder}")
    last = told(train("model=tiny_llama", *small, *diverging, *more), 7, 5).splitlines()[-1]
    assert last.startswith("step 2: loss is nan in micro-batch 1 of 2 (rows ")
    assert last.endswith("). Parameters are those of step 1, saved in checkpoints/step-00000001.")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["error"], summary["steps"]) == ("failed", last, 1)
    assert [row["step"] for row in library.open(folder).metrics] == [1]
    assert last in (folder / "events.log").read_text()
    assert not (folder / "adapter").exists()


@pytest.mark.slow
def test_8_a_resume_with_other_settings_is_refused_with_what_differs_and_how_to_accept(home: Path) -> None:
    other = write_rows(home / "other.jsonl", 30)
    done = lowrank("resume", str(home / "run"), "loop.steps=4", "optim.lr=1e-4", f"data.path={other}")
    assert told(done, 8, 6).splitlines()[-1] == (
        "resume refused: optim.lr 0.0005 → 0.0001; data sha256 differs. To accept: 'checkpoint.allow=[optim.lr,data]'."
    )


@pytest.mark.slow
def test_9_a_damaged_checkpoint_is_named_and_the_one_before_is_used(home: Path) -> None:
    damage = [home / f"run/checkpoints/step-{step:08d}/adapter.safetensors" for step in (3, 2, 1)]
    flip(damage[0])
    said = told(lowrank("resume", str(home / "run"), "loop.steps=4"), 9, 0)
    named = "checkpoints/step-00000003/adapter.safetensors: sha256 differs from its manifest; using step-00000002."
    assert named in said
    shutil.rmtree(home / "run/adapter")
    for path in (home / "run/checkpoints").glob("step-*/adapter.safetensors"):
        flip(path)
    assert "adapter.safetensors: sha256 differs from its manifest" in told(
        lowrank("resume", str(home / "run"), "loop.steps=5"), 9, 6
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


GREEDY = """
import resource
import torch
from lowrank.adapters import LoRA

class Greedy(LoRA):
    def forward(self, base, x):
        if self.clock.now == (2, 0):
            with open("/proc/self/status") as status:
                taken = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))
            resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, resource.RLIM_INFINITY))
            torch.empty(2**28)
        return super().forward(base, x)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_10_memory_that_is_not_there_is_counted_beside_what_would_fit(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "greedy.py").write_text(GREEDY)
    method = ("adapter._target_=greedy.Greedy", "adapter.targets=[down_proj]", f"hydra.run.dir={tmp_path}/run")
    given = (*SMALL, *STEPS, "model=tiny_llama", f"data.path={rows}", *method)
    said = told(train(*given, cwd=tmp_path, PYTHONPATH=str(tmp_path)), 10, 3)
    assert re.search(r"^CPU out of memory: the run needs ≈ [\d,.]+ [MG]iB of [\d,.]+ [MG]iB\. ", said, re.MULTILINE)
    assert re.search(r"(These fit|the least is)[: ].*loop\.\w+=\w+", said)


@pytest.mark.slow
def test_11_an_adapter_on_another_base_is_refused_with_the_tensor_that_differs(trained: Path) -> None:
    file = next((trained / "model").glob("*.safetensors"))
    kept, tensors = file.read_bytes(), load_file(file)
    name = next(name for name in tensors if "embed_tokens" in name)
    try:
        save_file({**tensors, name: tensors[name] + torch.ones(())}, file, metadata={"format": "pt"})
        said = told(lowrank("generate", str(trained / "run"), "Say number 3."), 11, 6)
    finally:
        file.write_bytes(kept)
    assert re.search(
        r"^adapter was trained on base [0-9a-f]{8}…, this base is [0-9a-f]{8}… \(.*embed_tokens.* differs\)\.$",
        said,
        re.M,
    )


def test_12_a_model_that_is_not_there_is_said_with_what_to_do(tmp_path: Path, rows: Path) -> None:
    said = refused(12, 2, tmp_path, f"data.path={rows}", "model=hf", "model.name=gtp2")
    assert said.startswith("model.name: 'gtp2' is neither a folder nor reachable on the hub (offline).\n")
    assert "Give a folder that holds config.json, weights and tokenizer" in said


@pytest.fixture
def busy(tmp_path: Path, rows: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that trains in tmp_path/run."""
    given = (*SMALL, "model=tiny_llama", f"data.path={rows}", "loop.steps=100000", "eval.before=false")
    command = [sys.executable, str(ROOT / "train.py"), *given, f"hydra.run.dir={tmp_path}/run"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            if (tmp_path / "run/metrics.jsonl").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_13_a_run_directory_in_use_names_the_process(tmp_path: Path, rows: Path, busy: subprocess.Popen[bytes]) -> None:
    given = (*SMALL, "model=tiny_llama", f"data.path={rows}", "checkpoint.resume=true", f"hydra.run.dir={tmp_path}/run")
    said = told(train(*given), 13, 6)
    assert said == f"{tmp_path}/run: in use by process {busy.pid}.\n"
