"""``lowrank verify`` names every file of a run that is not what the run wrote."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SMALL, lowrank, run, write_rows
from transformers import LlamaForCausalLM

import lowrank as library
from lowrank.errors import ConfigError, NumericsError, RefusedError
from lowrank.record.verify import verify

RUN = ("model=tiny_llama", "loop.steps=6", "checkpoint.every=2", "eval.before=false", "eval.every=2")


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield [*SMALL, *RUN, f"data.path={write_rows(tmp_path_factory.mktemp('data') / 'rows.jsonl')}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    return library.train(settings, tmp_path_factory.mktemp("run") / "run").folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def faults(folder: Path) -> list[str]:
    return [fault for found in verify(folder) for fault in found.faults]


def test_a_run_as_it_was_written_has_a_line_for_each_thing_and_exits_0_at_once(finished: Path) -> None:
    started = time.perf_counter()
    done = lowrank("verify", str(finished))
    seconds = time.perf_counter() - started
    assert (done.returncode, done.stderr) == (0, "")
    told = [line.split(":")[0] for line in done.stdout.splitlines()]
    steps = [f"checkpoints/step-{step:08d}" for step in (4, 6)]
    assert told == [*steps, "metrics.jsonl", "digests.jsonl", "adapter"]
    assert seconds < 5  # a few tenths on a quiet machine; torch alone would be more than a second


def test_the_command_loads_no_torch(finished: Path) -> None:
    code = "import sys\nfrom lowrank.cli import main\nmain(['verify', sys.argv[1]])\n"
    done = run("-c", f"{code}print([m for m in ('torch', 'transformers') if m in sys.modules])", str(finished))
    assert done.stdout.endswith("\n[]\n"), done.stderr


def test_every_file_with_a_hash_is_named_when_a_bit_of_it_flips(copy: Path) -> None:
    held = [*copy.glob("checkpoints/step-*/*"), *(copy / "adapter").iterdir()]
    assert len(held) == 4 * 2 + 5
    for path in held:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        whole = path.read_bytes()
        path.write_bytes(content)
        assert [fault.split(":")[0] for fault in faults(copy)] == [path.relative_to(copy).as_posix()]
        path.unlink()
        assert faults(copy) == [f"{path.relative_to(copy).as_posix()}: missing"]
        path.write_bytes(whole)
    assert faults(copy) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "digests.jsonl"])
def test_a_file_that_grows_is_held_to_what_the_newest_checkpoint_knows(name: str, copy: Path) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole + b'{"event": "later"}\n')
    assert faults(copy) == []
    for damaged in (b"[" + whole[1:], whole[:100], b""):
        (copy / name).write_bytes(damaged)
        assert len(faults(copy)) == 1
        assert faults(copy)[0].startswith(f"{name}: the first ")
    (copy / name).unlink()
    assert faults(copy) == [f"{name}: missing"]


def test_all_that_is_damaged_is_named_and_the_exit_is_6(copy: Path) -> None:
    (copy / "checkpoints" / "step-00000004" / "state.json").write_bytes(b"{}")
    (copy / "adapter" / "adapter_model.safetensors").unlink()
    done = lowrank("verify", str(copy))
    assert done.returncode == 6
    for said in (done.stdout, done.stderr):
        assert "checkpoints/step-00000004/state.json: sha256 differs from its manifest" in said
        assert "adapter/adapter_model.safetensors: missing" in said
        assert "Traceback" not in said
    assert "checkpoints/step-00000006: 4 files" in done.stdout


def test_a_checkpoint_or_an_adapter_that_is_gone_altogether_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    shutil.rmtree(copy / "adapter")
    assert faults(copy) == ["checkpoints/step-00000006: missing", "adapter: missing"]


def test_a_run_without_checkpoints_says_so(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    done = lowrank("verify", str(copy))
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "checkpoints: none")


def test_a_run_before_its_end_has_no_adapter_and_that_is_no_fault(copy: Path) -> None:
    shutil.rmtree(copy / "adapter")
    (copy / "summary.json").write_text('{"status": "interrupted"}')
    assert faults(copy) == []
    assert str(list(verify(copy))[-1]) == "adapter: none yet"


def test_what_is_no_run_is_told_with_2(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        list(verify(tmp_path))
    assert lowrank("verify", str(tmp_path / "nowhere")).returncode == 2


@pytest.mark.parametrize("text", ["[]", "{", '{"newest": 3, "best": ["x"]}', '{"newest": "../../x"}', "[" * 99999])
def test_an_index_or_a_summary_that_is_none_is_no_crash(text: str, copy: Path) -> None:
    for path in (copy / "checkpoints" / "index.json", copy / "summary.json"):
        path.write_text(text)
    assert faults(copy) == []


# The final adapter's folder


def test_the_adapter_of_a_run_loads_with_its_manifest_beside_it(
    finished: Path, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    assert json.loads((finished / "adapter" / "MANIFEST.json").read_bytes())["step"] == 6
    opened = library.open(finished)
    ids = torch.tensor([[72, 101, 108]])
    bare = library.open(finished).loaded.model
    tuned = library.load_adapter(bare, finished / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(tuned(input_ids=ids).logits, opened.model(input_ids=ids).logits)


def test_a_run_that_went_on_is_opened_with_what_it_learnt_since(
    copy: Path, finished: Path, settings: list[str]
) -> None:
    longer = library.train([*settings, "loop.steps=8", "checkpoint.resume=true"], copy)
    assert json.loads((copy / "adapter" / "MANIFEST.json").read_bytes())["step"] == 8
    assert faults(copy) == []
    assert list(copy.glob(".staging*")) == []
    for name in ("adapter", "summary.json"):  # as if it had been killed before its second end
        (shutil.rmtree if name == "adapter" else Path.unlink)(copy / name)
        (shutil.copytree if name == "adapter" else shutil.copy)(finished / name, copy / name)
    assert same(weights(library.open(copy)), weights(longer))
    assert not same(weights(library.open(finished)), weights(longer))


def test_a_damaged_newest_checkpoint_is_said_when_an_older_one_is_opened(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "adapter")
    (copy / "checkpoints" / "step-00000006" / "optimizer.safetensors").write_bytes(b"")
    assert weights(library.open(copy))
    said = capsys.readouterr().err
    assert "step-00000006/optimizer.safetensors: sha256 differs from its manifest; using step-00000004." in said
    shutil.rmtree(copy / "checkpoints" / "step-00000004")
    with pytest.raises(RefusedError, match="no checkpoint that verifies"):
        library.open(copy).model  # noqa: B018


def test_weights_that_are_not_finite_make_no_final_adapter(finished: Path, tmp_path: Path) -> None:
    from lowrank.record.directory import Log
    from lowrank.session.outcome import save_adapter

    model = library.open(finished).model
    name, tensor = next(iter(weights_of(model).items()))
    tensor.data.view(-1)[3] = float("nan")
    model.requires_grad_(False)
    tensor.requires_grad_(True)
    with pytest.raises(NumericsError, match=name):
        save_adapter(model, tmp_path / "adapter", {}, None, Log(), step=6)
    assert list(tmp_path.iterdir()) == []


def weights_of(model: Any) -> dict[str, Any]:
    from lowrank.adapters.inject import adapter_state

    return adapter_state(model)


def weights(run: Any) -> dict[str, Any]:
    return weights_of(run.model)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
