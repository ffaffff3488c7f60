"""``python train.py``, as a user meets it: what it prints, its exit code, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIM = "raise ImportError('torch must not be imported here')\n"
TINY = (
    *("model=tiny_llama", "data=jsonl", "data.fields.response=output", "loop.steps=2"),
    *("eval.before=false", "eval.generate.limit=0", "data.max_length=64"),
)


def environment(outputs: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LOWRANK_DEBUG")}
    return {**kept, "LOWRANK_OUTPUTS": str(outputs), "OMP_NUM_THREADS": "1", **more}


def train(outputs: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(outputs, **more), cwd=ROOT, check=False, timeout=300
    )


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"say {i}", "input": "", "output": f"number {i}"} for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--cfg", "job", "experiment=demo"]])
def test_help_and_configuration_are_shown_without_torch(tmp_path: Path, outputs: Path, arguments: list[str]) -> None:
    for name in ("torch", "transformers", "bitsandbytes"):
        (tmp_path / "shim").mkdir(exist_ok=True)
        (tmp_path / f"shim/{name}.py").write_text(SHIM)
    done = train(outputs, *arguments, PYTHONPATH=str(tmp_path / "shim"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "adapter" in done.stdout
    assert not outputs.exists()


def test_help_names_every_group_its_choices_and_examples(outputs: Path) -> None:
    shown = train(outputs, "--help").stdout
    for expected in ("model: hf, smollm2, tiny_gpt2, tiny_llama", "quant: nf4, none", "experiment=demo", "-m optim.lr"):
        assert expected in shown
    assert "Hydra (" not in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["loop.steps=0"], "loop.steps: 0 is not allowed; a positive integer, or null.\n"),
        (["model=smolm2"], "model: 'smolm2' is not a choice. Did you mean 'smollm2'? Allowed: hf, smollm2,"),
        (["model=hf"], "model.name: missing; a folder or a hub id. Write model.name=….\n"),
        (["loop.steps=[1"], "loop.steps=[1: not a valid override (no viable alternative at input '[1')."),
        (["loop.seed=1,2"], "loop.seed: '1,2' is several values. Add -m to run one job for each"),
        (["--config-dir", "/nowhere"], "--config-dir: no folder '/nowhere'.\n"),
        (["-m", "optim.lrr=1,2"], "optim.lrr: unknown key. Did you mean 'lr'?"),
        (["-m", "model=tiny_llama,smolm2"], "model: 'smolm2' is not a choice. Did you mean 'smollm2'?"),
    ],
)
def test_a_refused_configuration_is_one_block_exit_2_and_no_folder(
    outputs: Path, arguments: list[str], said: str
) -> None:
    done = train(outputs, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    assert not outputs.exists()


def test_a_refused_run_leaves_no_folder_where_the_user_wanted_one(tmp_path: Path, outputs: Path) -> None:
    done = train(outputs, "adapter.r=0", f"hydra.run.dir={tmp_path}/mine")
    assert done.returncode == 2
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(("r", "code"), [(10**8, 3), (10**30, 2)])
def test_an_adapter_larger_than_memory_is_refused_before_it_is_made(outputs: Path, r: int, code: int) -> None:
    done = train(outputs, "model=tiny_llama", f"adapter.r={r}")
    assert done.returncode == code
    assert done.stderr.startswith("adapter: ")
    assert done.stderr.count("\n") == 1
    assert not outputs.exists()


def test_debugging_brings_the_traceback_back(outputs: Path) -> None:
    done = train(outputs, "loop.steps=0", LOWRANK_DEBUG="1")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("loop.steps: 0 is not allowed; a positive integer, or null.\n")


def test_a_bug_keeps_its_traceback_and_exits_1(tmp_path: Path, outputs: Path) -> None:
    (tmp_path / "conf/adapter").mkdir(parents=True)
    (tmp_path / "conf/adapter/buggy.yaml").write_text("_target_: buggy.Buggy\ntargets: all-linear\n")
    (tmp_path / "buggy.py").write_text("1 / 0\n")
    done = train(outputs, f"--config-dir={tmp_path}/conf", "adapter=buggy", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_sweep_with_one_wrong_job_starts_none(outputs: Path) -> None:
    done = train(outputs, "-m", "model=tiny_llama", "adapter.r=4,0", "loop.steps=1")
    assert (done.returncode, done.stdout) == (2, "")
    said = "job 2 (adapter.r=0): adapter.r: 0 is not allowed; a positive integer.\nNo job was started.\n"
    assert done.stderr == said
    assert not outputs.exists()


def test_two_jobs_never_share_a_folder(outputs: Path) -> None:
    done = train(outputs, "-m", "adapter.r=4,8", "hydra.sweep.subdir=same")
    assert (done.returncode, done.stderr) == (
        2,
        "hydra.sweep.subdir: two jobs would share a folder. No job was started.\n",
    )
    assert not outputs.exists()


# What follows trains: tiny models, a few steps.


def test_a_run_leaves_its_own_files_and_none_of_hydras(rows: Path, outputs: Path) -> None:
    done = train(outputs, *TINY, f"data.path={rows}")
    assert done.returncode == 0, done.stderr
    (folder,) = outputs.glob("*/*")
    assert folder.name.endswith("-tiny_llama-lora-none")
    assert (folder / "config.yaml").is_file()
    assert not (folder / ".hydra").exists()
    assert not list(folder.glob("train*.log"))


def test_a_data_error_exits_4_and_leaves_no_folder(tmp_path: Path, outputs: Path) -> None:
    done = train(outputs, *TINY, f"data.path={tmp_path}/missing.jsonl")
    assert done.returncode == 4, done.stderr
    assert "missing.jsonl" in done.stderr
    assert not outputs.exists()


def test_a_sweep_goes_on_after_a_failed_job_and_names_it(tmp_path: Path, rows: Path, outputs: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    done = train(outputs, "-m", *TINY, f"data.path={missing},{rows}", "loop.seed=${hydra:job.num}")
    assert done.returncode == 1
    (sweep,) = outputs.glob("multirun/*")
    told = {path.parent: json.loads(path.read_text()) for path in sweep.glob("*/summary.json")}
    (good,) = (folder for folder, summary in told.items() if summary["status"] == "done")
    (refused,) = (summary for summary in told.values() if summary["status"] == "failed")
    assert str(missing) in refused["error"]
    assert len(good.name) < 80
    assert "seed: 1\n" in (good / "config.yaml").read_text().split("loop:")[1]  # hydra:job.num is the job's own
    assert "[1/2] failed (exit 4)\n" in done.stdout
    assert done.stdout.endswith("[2/2] done\n")
    *_, counted, named = done.stderr.splitlines()
    assert counted == "1 of 2 jobs failed:"
    assert named.startswith(f"  {sweep}/data.path=")
    assert str(missing) in named


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stopping_a_sweep_stops_its_job_and_starts_no_other(number: signal.Signals, rows: Path, outputs: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "-m", *TINY, f"data.path={rows}"]
    command += ["loop.steps=100000", "loop.seed=1,2"]
    process = subprocess.Popen(
        command, env=environment(outputs), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        for _ in range(1200):
            if any(path.stat().st_size for path in outputs.glob("multirun/*/*/metrics.jsonl")):
                break
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"{number.name} in ".encode() in stderr
    assert b"Traceback" not in stderr
    assert len(list(outputs.glob("multirun/*/*/metrics.jsonl"))) == 1
    (summary,) = outputs.glob("multirun/*/*/summary.json")  # the job had the signal too, once, and saved
    assert json.loads(summary.read_text())["status"] == "interrupted"
