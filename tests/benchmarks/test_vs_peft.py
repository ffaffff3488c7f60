"""The comparison with PEFT + Trainer, small: both arms train the same, and the figures land where they belong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.arm import Result
from benchmarks.table import BEGIN, END, markdown
from benchmarks.vs_peft import Pair, refuse_different_work

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--model=tiny_llama", "--pairs=1", "--steps=3", "--warmup=1", "--micro-batch=4", "--threads=1"]
README = ROOT / "benchmarks" / "README.md"

RESULT = Result(
    arm="peft",
    losses=[3.0, 2.0, 1.0],
    lrs=[3e-4, 2e-4, 1e-4],
    seconds=[9.0, 1.0, 3.0],
    real_tokens=[100, 100, 300],
    positions=[200, 200, 400],
    token_hashes=["a", "b", "c"],
    trainable_parameters=7,
    peak_mb=1000.0,
    threads=1,
    versions={"torch": "2"},
)


def test_both_arms_train_the_same_on_the_same_tokens_and_the_readme_says_how_fast(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    rows = [{"instruction": "Repeat it.", "input": "ab " * n, "response": "cd " * (n % 7 + 1)} for n in range(1, 40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "benchmarks/vs_peft.py", *SMALL, f"--data={data}", "--write", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [pair] = json.loads((tmp_path / "vs_peft.json").read_text(encoding="utf-8"))["pairs"]
    peer, ours = (Result(**pair[arm]) for arm in ("peer", "ours"))
    assert len(ours.losses) == len(peer.seconds) == len(ours.seconds) == 4
    assert len(set(ours.token_hashes)) == 4
    assert peer.token_hashes == ours.token_hashes
    assert peer.losses == pytest.approx(ours.losses, abs=1e-5)
    assert peer.lrs == pytest.approx(ours.lrs, rel=1e-12)
    assert peer.real_tokens == ours.real_tokens == ours.positions
    assert sum(peer.positions) > sum(peer.real_tokens)
    assert min(*peer.seconds, *ours.seconds) > 0
    check_written(tmp_path)


def check_written(folder: Path) -> None:
    before, after = (path.read_text(encoding="utf-8") for path in (README, folder / "README.md"))
    assert after.partition(BEGIN)[0] == before.partition(BEGIN)[0]
    assert after.partition(END)[2] == before.partition(END)[2]
    written = after.partition(BEGIN)[2].partition(END)[0]
    for expected in ("| real tokens/s |", "| peak RSS, MB |", "tiny_llama", "--pairs=1", "(vs_peft.svg)"):
        assert expected in written
    assert (folder / "vs_peft.svg").read_text(encoding="utf-8").startswith("<svg")


def test_warm_up_steps_and_padding_do_not_count_in_the_speed() -> None:
    assert RESULT.tokens_per_s(warmup=1) == (100 + 300) / (1.0 + 3.0)


def test_a_ratio_is_the_median_over_pairs_of_ours_by_theirs() -> None:
    pairs = [
        Pair(RESULT, replace(RESULT, seconds=[1.0, 4.0 / times, 0.0], peak_mb=share * 1000), 0.0)
        for times, share in ((1.5, 0.5), (3.0, 0.4), (2.5, 0.3))
    ]
    about = {
        "model": "m",
        "data": "d",
        "micro_batch": 1,
        "steps": 3,
        "cpu": "c",
        "cores": 1,
        "flags": [],
        "command": "x",
    }
    rows = {line.split(" | ")[0]: line for line in markdown(pairs, 1, about).splitlines()}
    assert "| 2.50× (1.50–3.00) | ≥ 2.0× |" in rows["| real tokens/s"]
    assert "| 0.40× (0.30–0.50) | ≤ 0.5× |" in rows["| peak RSS, MB"]


@pytest.mark.parametrize(
    "other",
    [
        replace(RESULT, token_hashes=["a", "b", "d"]),
        replace(RESULT, lrs=[3e-4, 2e-4, 2e-4]),
        replace(RESULT, losses=[3.0, 2.0, 1.1]),
        replace(RESULT, losses=[3.0, 2.0, float("nan")]),
        replace(RESULT, trainable_parameters=8),
        replace(RESULT, threads=2),
    ],
)
def test_arms_that_did_not_do_the_same_work_are_not_compared(other: Result) -> None:
    with pytest.raises(SystemExit, match="did not do the same work"):
        refuse_different_work(RESULT, other)
    refuse_different_work(RESULT, replace(RESULT, arm="lowrank", peak_mb=1.0))
