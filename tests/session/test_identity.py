"""What a run's numbers depend on: all that changes them changes the identity, and nothing else does."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import ROOT, SMALL, environment, write_rows
from transformers import PreTrainedTokenizerBase

import lowrank
from lowrank.adapters import LoRA
from lowrank.models import load, tiny
from lowrank.record import source
from lowrank.schema import Model
from lowrank.session import identity
from lowrank.session.identity import differences, names, recorded, tokenizer_hash, within

BRIEF = (*SMALL, "model=tiny_llama", "loop.steps=2", "eval.before=false", "eval.generate.limit=0", "checkpoint.every=1")
RESUME = "checkpoint.resume=true"


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def done(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> lowrank.Run:
    return lowrank.train([*BRIEF, f"data.path={rows}"], tmp_path_factory.mktemp("run") / "run")


def refused(run: lowrank.Run, *overrides: str) -> str:
    with pytest.raises(lowrank.errors.RefusedError) as error:  # type: ignore[attr-defined]
        lowrank.train([*BRIEF, RESUME, *overrides], run.folder)
    return str(error.value)


# What is in it


def test_it_is_flat_json_without_a_path_and_says_what_auto_has_become(done: lowrank.Run, rows: Path) -> None:
    found, told = recorded(done.folder)
    assert found["loop.precision"] == "fp32"
    assert (found["loop.device"], found["model.dtype"], found["steps"]) == ("cpu", "fp32", 2)
    assert found["threads"] == torch.get_num_threads()
    assert found["machine"].endswith(torch.backends.cpu.get_cpu_capability())
    assert not any(isinstance(value, dict) and value for value in found.values())
    assert str(rows.parent) not in json.dumps(found)
    assert not any(within(name, identity.FREE) for name in found)
    assert told["directory"] == str(Path.cwd())
    [*_, newest] = sorted((done.folder / "checkpoints").glob("step-*"))
    assert json.loads((newest / "state.json").read_text())["identity"] == found


def test_infinity_and_tuples_come_back_from_a_file_as_they_went() -> None:
    flat = identity.flat({"a": {"b": float("inf"), "c": (1, 2), "d": {}}, "e": None})
    assert flat == {"a.b": ".inf", "a.c": [1, 2], "a.d": {}, "e": None}
    assert json.loads(json.dumps(flat)) == flat


def test_differences_are_told_field_by_field() -> None:
    old = {"optim.lr": 2e-4, "data": "a" * 64, "seed": 0, "gone": 1, "fast": "x" * 64}
    new = {"optim.lr": 1e-4, "data": "b" * 64, "seed": 0, "new": None, "fast": "y"}
    assert differences(old, new) == {
        "optim.lr": "0.0002 → 0.0001", "data": "sha256 differs", "gone": "1 → (not set)",
        "fast": f"{'x' * 64} → y", "new": "(not set) → null",
    }  # fmt: skip
    assert differences(old, dict(reversed(old.items()))) == {}


def test_what_may_be_allowed_are_fields_keys_and_the_groups_above_them(done: lowrank.Run) -> None:
    known = names(done.config, {"optim.gone": 1})
    for name in ("optim", "optim.lr", "optim.gone", "data", "data.fields", "versions", "code", "track", "steps"):
        assert (name in known) == (name != "steps"), name
    assert within("data.fields.text", ["data"])
    assert not within("dataset", ["data"])


# The same run in another place


def test_another_folder_path_and_working_directory_are_the_same_run(
    done: lowrank.Run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "copy.jsonl").write_bytes(rows.read_bytes())
    subprocess.run(["cp", "-r", str(done.folder), str(tmp_path / "moved")], check=True)
    monkeypatch.chdir(tmp_path / "other")
    before = (tmp_path / "moved" / "summary.json").read_bytes()
    again = lowrank.train([*BRIEF, RESUME, "data.path=copy.jsonl", "loop.device=auto"], tmp_path / "moved")
    assert (again.folder / "summary.json").read_bytes() == before


def test_the_same_path_with_another_content_is_another_run(done: lowrank.Run, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "rows.jsonl", 21)
    assert refused(done, f"data.path={other}").startswith("resume refused: data sha256 differs. To accept:")


# The tokenizer


def hashed(folder: Path) -> str:
    return tokenizer_hash(load.tokenizer(Model("hf", str(folder))))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model's, to be edited."""
    subprocess.run(["cp", "-rL", str(tiny.folder("tiny_llama")), str(tmp_path / "model")], check=True)
    return tmp_path / "model"


def swap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    one, other, *_ = [name for name in vocabulary if name.isalpha()]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", swap),
        ("tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
        ("tokenizer.json", lambda t: t.update(normalizer={"type": "NFKC"})),
        ("tokenizer.json", lambda t: t["added_tokens"][0].update(lstrip=True)),
        ("tokenizer_config.json", lambda t: t.update(pad_token="<|eos|>")),
    ],
    ids=["vocabulary", "normalizer", "rare normalizer", "special", "padding"],
)
def test_whatever_makes_other_token_ids_is_another_tokenizer(folder: Path, name: str, change: Any) -> None:
    before = hashed(folder)
    edit(folder / name, lambda content: None)
    assert hashed(folder) == before
    edit(folder / name, change)
    assert hashed(folder) != before


def test_the_chat_template_is_part_of_the_tokenizer_and_the_last_call_is_not(folder: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = load.tokenizer(Model("hf", str(folder)))
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(load.tokenizer(Model("tiny_llama")))
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer_hash(tokenizer) != before


def test_an_edit_of_the_models_config_is_another_architecture(folder: Path) -> None:
    from lowrank.compose import compose
    from lowrank.session.identity import architecture_hash

    config = compose(["model=hf", f"model.name={folder}"])
    before = architecture_hash(config)
    assert before == architecture_hash(compose(["model=tiny_llama"]))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 1e-5}))
    assert architecture_hash(config) != before


# The code


def test_own_classes_count_with_what_they_derive_from_and_installed_ones_by_version(tmp_path: Path) -> None:
    (tmp_path / "own_base_of_a_test.py").write_text("from lowrank.adapters import LoRA\nclass Base(LoRA): pass\n")
    module = tmp_path / "own_of_a_test.py"
    module.write_text("from own_base_of_a_test import Base\nclass Own(Base): pass\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        cls = __import__("own_of_a_test").Own
    own = source.files([cls])
    plain = source.files([LoRA, torch.optim.AdamW])
    assert own.keys() - plain.keys() == {
        "own_of_a_test (own_of_a_test.py)",
        "own_base_of_a_test (own_base_of_a_test.py)",
    }
    assert {"train.py", "lowrank/session/identity.py", "lowrank/train/loop.py"} <= plain.keys()
    module.write_text(module.read_text() + "# another\n")
    assert source.code_hash(source.files([cls])) != source.code_hash(own)
    assert source.own_modules([cls])["own_of_a_test"] == str(tmp_path)
    assert "pytest" in identity.versions([pytest.MonkeyPatch])


def test_a_class_without_a_file_has_no_code_to_hash() -> None:
    made = type("Made", (LoRA,), {"__module__": "__nowhere__"})
    assert source.files([made]) == source.files([])


# Where it lies in git


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", str(root), *who, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "lowrank").mkdir(parents=True)
    (root / "lowrank/__init__.py").write_text("one\n")
    (root / "train.py").write_text("entry\n")
    (root / "notes.md").write_text("mine\n")
    git(root, "init", "-q", "-b", "main")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return root


def look(root: Path, seconds: float = 5.0) -> source.Checkout:
    return source.read_checkout(root, time.monotonic() + seconds)


def test_a_clean_checkout_has_a_commit_and_no_patch(checkout: Path) -> None:
    (checkout / "notes.md").write_text("no code\n")
    assert look(checkout) == source.Checkout(git(checkout, "rev-parse", "HEAD"), "")
    assert look(checkout).to_dict() == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}


def test_the_patch_makes_of_the_commit_the_code_that_ran(checkout: Path, tmp_path: Path) -> None:
    git(checkout, "clone", "-q", ".", str(tmp_path / "clone"))
    git(checkout, "config", "diff.noprefix", "true")
    changed = {
        "lowrank/__init__.py": "one\r\ntwo", "lowrank/new.py": "without an end", "conf/a ü.yaml": "x: 1\n\ny: 2\n",
        "lowrank/empty.py": "", "train.py": "other\n",
    }  # fmt: skip
    for name, text in changed.items():
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_bytes(text.encode())
    git(checkout, "add", "train.py")
    (tmp_path / "code.patch").write_bytes(look(checkout).patch.encode())
    git(tmp_path / "clone", "apply", str(tmp_path / "code.patch"))
    for name, text in changed.items():
        assert (tmp_path / "clone" / name).read_bytes() == text.encode(), name


def test_what_is_no_text_or_too_much_is_named_and_left_out(checkout: Path) -> None:
    (checkout / "lowrank/link.py").symlink_to("/etc/hostname")
    (checkout / "lowrank/bytes.bin").write_bytes(b"\xff\xfe\x00")
    (checkout / "lowrank/large.py").write_text("x" * (source.MOST + 1))
    patch = look(checkout).patch
    for name in ("link.py", "bytes.bin", "large.py"):
        assert f"# lowrank/{name}: uncommitted, and left out" in patch
    assert len(patch) < 1000
    for i in range(3):
        (checkout / f"lowrank/half{i}.py").write_text("x" * (source.MOST // 2))
    patch = look(checkout).patch
    assert len(patch) < source.MOST + 1000
    assert patch.endswith("the rest is left out\n")


def test_without_git_without_commits_and_without_time_a_run_goes_on(checkout: Path, tmp_path: Path) -> None:
    assert look(checkout, seconds=0) == source.Checkout(None, "")
    (tmp_path / "bare/lowrank").mkdir(parents=True)
    (tmp_path / "bare/lowrank/__init__.py").write_text("")
    assert look(tmp_path / "bare").to_dict() is None
    git(tmp_path / "bare", "init", "-q")
    assert look(tmp_path / "bare").to_dict() is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert look(checkout).to_dict() is None


def test_a_slow_git_is_not_waited_for(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "bin/git").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path / 'bin'}:{environment()['PATH']}")
        started = time.monotonic()
        assert look(checkout, seconds=0.3).commit is None
        assert time.monotonic() - started < 3


def test_a_run_directory_tells_its_commit_and_what_was_uncommitted(done: lowrank.Run) -> None:
    told = source.checkout()
    assert done.summary["git"] == told.to_dict()
    assert (done.folder / "code.patch").exists() == bool(told.patch)
    if told.commit:
        assert told.commit == git(ROOT, "rev-parse", "HEAD")
