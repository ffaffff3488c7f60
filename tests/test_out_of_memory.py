"""A failed allocation ends a run with what would fit and exit code 3, wherever it happens; what was saved stays.

The memory that is missing is missing: a limit on addresses is set in the run's own process, by a method of the user's.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from cli import SMALL, train, write_rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")

# Wants a GiB where it may have a quarter of that: at the forward pass that MODULE.when says.
GREEDY = """
import resource
import torch
from lowrank.adapters import LoRA

def taken():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))

class Greedy(LoRA):
    def forward(self, base, x):
        if {when}:
            resource.setrlimit(resource.RLIMIT_AS, (taken() + 2**28, resource.RLIM_INFINITY))
            {want}
        return super().forward(base, x)
"""
ALLOCATED = "torch.empty(2**28)"


def greedy(folder: Path, when: str, want: str = ALLOCATED) -> tuple[str, ...]:
    """A method of the user's own, and the arguments of a run with it."""
    (folder / "greedy.py").write_text(GREEDY.format(when=when, want=want))
    rows = write_rows(folder / "rows.jsonl")
    method = ("adapter._target_=greedy.Greedy", "adapter.targets=[down_proj]")
    return (*SMALL, "model=tiny_llama", f"data.path={rows}", "loop.steps=4", "checkpoint.every=1", *method)


STEP_3 = "self.clock.now == (3, 0)"
JUDGED = "self.clock.now == (4, 0) and not torch.is_grad_enabled()"


@pytest.mark.parametrize(
    ("when", "step", "saved"),
    [(STEP_3, 2, 2), pytest.param(JUDGED, 4, 3, marks=pytest.mark.slow)],
    ids=["training", "evaluating"],
)
def test_a_failed_allocation_names_settings_that_fit_and_keeps_the_checkpoints(
    tmp_path: Path, when: str, step: int, saved: int
) -> None:
    arguments = greedy(tmp_path, when)
    ended = train(*arguments, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert ended.returncode == 3, ended.stderr
    last = ended.stderr.strip().splitlines()
    assert "Traceback" not in ended.stderr
    block = "\n".join(last[-2:])
    assert re.search(r"^CPU out of memory: the run needs ≈ [\d,.]+ [MG]iB of [\d,.]+ [MG]iB\. ", block, re.MULTILINE)
    assert re.search(r"(These fit|the least is)[: ].*loop\.\w+=\w+", block)
    assert "1073741824 bytes" in block
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("failed", step)
    assert summary["error"] in ended.stderr
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert kept[-1] == f"step-{saved:08d}"


@pytest.mark.slow
def test_the_run_goes_on_from_there_where_there_is_memory(tmp_path: Path) -> None:
    arguments = greedy(tmp_path, f"__import__('os').environ.get('SHORT') and {STEP_3}")
    folder = f"hydra.run.dir={tmp_path}/run"
    assert train(*arguments, folder, cwd=tmp_path, PYTHONPATH=str(tmp_path), SHORT="1").returncode == 3
    ended = train(*arguments, folder, "checkpoint.resume=true", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 4
