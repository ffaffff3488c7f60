"""What is said where memory is not there."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli import SMALL, environment, write_rows
from deep import parts_and_data

from lowrank.errors import ConfigError, OutOfMemory, out_of_memory
from lowrank.ledger.shortage import Shortage
from lowrank.models.tiny import byte_tokenizer
from lowrank.testing.bases import build_llama

ONE = ("loop.gradient_checkpointing=block", "loop.micro_batch=1", "eval.generate.limit=0", "eval.limit=1")


def failed() -> Exception:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        failed(),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_allocation_is_known_by_whoever_tells_of_it(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape '[2]' is invalid"), OSError(errno.ENOSPC, "full"), KeyError("a")]
)
def test_nothing_else_is_taken_for_one(error: Exception, tmp_path: Path) -> None:
    assert not out_of_memory(error)
    shortage = Shortage(*parts_and_data(tmp_path), 0)
    assert shortage.explained(error) is None
    assert shortage.explained(ConfigError("out of memory")) is None
    with pytest.raises(type(error)), shortage.told():
        raise error


def test_tensors_of_the_step_that_failed_are_let_go_of_before_anything_is_predicted(tmp_path: Path) -> None:
    shortage = Shortage.of(*parts_and_data(tmp_path, *ONE))
    held: list[weakref.ref[torch.Tensor]] = []

    def step() -> None:
        activations = torch.ones(3)
        held.append(weakref.ref(activations))
        torch.empty(2**60)

    with (
        pytest.raises(OutOfMemory, match=r"^CPU out of memory: the run needs ≈ [\d,.]+ [MG]iB of ") as raised,
        shortage.told(),
    ):
        step()
    assert held[0]() is None
    assert raised.value.exit_code == 3
    assert out_of_memory(raised.value.__cause__ or KeyError())


def test_where_no_prediction_can_be_made_the_sentence_is_plain(tmp_path: Path) -> None:
    parts, data = parts_and_data(tmp_path)
    shortage = Shortage(parts, replace(data, train=[]), 0)  # nothing to put into a step
    said = str(shortage.explained(failed()))
    assert re.match(r"CPU out of memory: .*allocate.*\nLess is needed with .*loop\.gradient_checkpointing=block", said)


def test_a_run_that_is_small_for_the_machine_is_not_warned_of(tmp_path: Path) -> None:
    assert Shortage.of(*parts_and_data(tmp_path)).warning() is None


LIMITED = """
import resource
import sys
from pathlib import Path
from lowrank import compose, run

def taken():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))

config = compose.compose(sys.argv[2:])
resource.setrlimit(resource.RLIMIT_AS, (taken() + 2**27, resource.RLIM_INFINITY))
with compose.reporting(Path(sys.argv[1])):
    run.train(config, Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("more", [[], ["model.dtype=bf16"], ["quant=nf4"]], ids=["mapped", "cast", "nf4"])
def test_weights_too_large_for_the_machine_are_warned_of_and_then_refused_with_what_would_fit(
    tmp_path: Path, more: list[str]
) -> None:
    """350 MB of them where 128 MiB can still be had."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8}
    tokens = {"vocab_size": 260, "pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 257}
    build_llama(**sizes, **tokens).save_pretrained(tmp_path / "model")
    byte_tokenizer(adds_bos=True).save_pretrained(tmp_path / "model")
    rows, folder = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    arguments = [*SMALL, *ONE, "model=hf", f"model.name={tmp_path / 'model'}", f"data.path={rows}", *more]
    command = [sys.executable, "-c", LIMITED, str(folder), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=300)
    assert ended.returncode == 3, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "memory: the run needs ≈" in ended.stderr
    assert re.search(
        r"^CPU out of memory: the run needs ≈ \d+ MiB of \d+ MiB\. (These fit|Nothing)", ended.stderr, re.M
    )
    assert not folder.exists()


@pytest.mark.cuda
def test_on_cuda_the_allocators_failure_is_told_with_what_fits(tmp_path: Path) -> None:
    shortage = Shortage.of(*parts_and_data(tmp_path, *ONE, "loop.device=cuda"))
    with pytest.raises(OutOfMemory, match=r"^CUDA out of memory: the run needs ≈ ") as raised, shortage.told():
        torch.empty(2**45, device="cuda")
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
