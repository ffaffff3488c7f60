"""The folder that a combination writes, the command, and what cannot be combined."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from banks import furthest, logits, trained
from cli import lowrank
from safetensors.torch import load_file, save_file
from sums import same_files, saved
from torch import Tensor

from lowrank.adapters import DoRA, Full, LoRA
from lowrank.adapters.combine import combine
from lowrank.adapters.plan import Rules
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.errors import ConfigError, RefusedError

Make = Callable[..., Any]


def test_the_folder_is_an_ordinary_one_and_says_what_it_is_made_of(make_llama: Make, tmp_path: Path) -> None:
    base = {"model.embed_tokens.weight": "3f2a"}
    folders = [saved(make_llama, tmp_path, {"q_proj": LoRA}, name, base=base) for name in ("one", "two")]
    report = combine(folders, [1.0, -0.5], tmp_path / "made", rank=3)
    about = json.loads((tmp_path / "made" / "adapter.json").read_text())
    assert about["base"] == base
    assert about["combined"]["of"] == [
        {"folder": str(folders[0]), "weight": 1.0},
        {"folder": str(folders[1]), "weight": -0.5},
    ]
    assert [row["options"] for row in about["plan"]["rows"]] == [{"r": 3, "alpha": 3.0}] * 2
    assert report.folder == tmp_path / "made"
    assert f"worst {report.worst.error:.2e}" in str(report)
    combine([tmp_path / "made", folders[0]], [1.0, 1.0], tmp_path / "again")


def test_adapters_that_started_from_the_weights_are_combined_on_the_original_base(
    model: Any, tmp_path: Path, tokens: Tensor
) -> None:
    bare = copy.deepcopy(model)
    pissa = trained(model, {"all-linear": partial(LoRA, r=2, alpha=3.0, init="pissa")})
    combine([save_adapter(pissa, tmp_path / "pissa")], [1.0], tmp_path / "plain")
    assert furthest(logits(load_adapter(bare, tmp_path / "plain"), tokens), logits(pissa, tokens)) <= 1e-5


# Bad input


def damage(folder: Path, value: float) -> Path:
    tensors = load_file(folder / "adapter.safetensors")
    tensors[next(iter(tensors))].view(-1)[0] = value
    save_file(tensors, folder / "adapter.safetensors")
    return folder


def test_what_cannot_be_combined_is_refused_with_nothing_written(
    make_llama: Make, make_gpt2: Make, tmp_path: Path
) -> None:
    q: Rules = {"q_proj": partial(LoRA, r=2)}
    one = saved(make_llama, tmp_path, q, "one", base={"w": "3f"})
    unlike = {
        r"q_proj carries DoRA; only LoRA": saved(make_llama, tmp_path, {"q_proj": DoRA}, "dora"),
        r"carries Full; only LoRA": saved(make_llama, tmp_path, {"*norm*": Full}, "full"),
        "were trained on different bases": saved(make_llama, tmp_path, q, "base", base={"w": "91"}),
        "is 32×32 in .* and 64×64 in .*: not adapters of one base": saved(
            lambda: make_llama(hidden_size=64), tmp_path, q, "wide"
        ),
        r"the base of .* parameters and that of .*: not adapters": saved(make_gpt2, tmp_path, {"c_attn": LoRA}, "gpt2"),
        "holds values that are not finite": damage(saved(make_llama, tmp_path, q, "nan"), float("nan")),
        "no adapter.json there": tmp_path / "nowhere",
        "quantised the rest anew": saved(make_llama, tmp_path, {"q_proj": partial(LoRA, init="loftq")}, "loftq"),
    }
    for message, other in unlike.items():
        with pytest.raises(RefusedError, match=message):
            combine([one, other], [0.5, 0.5], tmp_path / "made")
    settings: list[tuple[str, list[Path], list[float], dict[str, Any]]] = [
        ("weight: nan is not allowed", [one], [float("nan")], {}),
        ("1 adapters and 2 weights", [one], [1.0, 2.0], {}),
        ("0 adapters", [], [], {}),
        ("rank: 0 is not allowed; a positive integer", [one], [1.0], {"rank": 0}),
        (r"density: 0.0 is not allowed; a number above 0", [one], [1.0], {"density": 0.0}),
        (r"method: tise is not allowed.*Did you mean 'ties'", [one], [1.0], {"method": "tise"}),
        ("beyond fp32", [one], [1e39], {}),
    ]
    for message, folders, weights, options in settings:
        with pytest.raises(ConfigError, match=message):
            combine(folders, weights, tmp_path / "made", **options)
    assert not (tmp_path / "made").exists()
    before = sorted((one / name, (one / name).read_bytes()) for name in ("adapter.json", "adapter.safetensors"))
    with pytest.raises(ConfigError, match="not an empty folder"):
        combine([one], [1.0], one)
    assert sorted((path, path.read_bytes()) for path in one.iterdir()) == before


def test_the_command_prints_the_error_and_ends_with_the_code_of_what_is_wrong(make_llama: Make, tmp_path: Path) -> None:
    one, two = (saved(make_llama, tmp_path, {"q_proj": partial(LoRA, r=4)}, name) for name in ("one", "two"))
    run = tmp_path / "run"
    saved(make_llama, run, {"q_proj": partial(LoRA, r=4)}, "adapter")  # a run directory holds it under this name
    done = lowrank("combine", str(tmp_path / "made"), f"{one}=0.5", f"{two}=-0.5", str(run), "--rank", "3")
    assert done.returncode == 0, done.stderr
    report = combine([one, two, run / "adapter"], [0.5, -0.5, 1.0], tmp_path / "same", rank=3)
    assert done.stdout.splitlines()[:-1] == str(report).splitlines()[:-1]
    assert same_files(tmp_path / "made", tmp_path / "same")
    dora = saved(make_llama, tmp_path, {"q_proj": DoRA}, "dora")
    for code, *words in ((6, str(one), str(dora)), (2, f"{one}=half")):
        done = lowrank("combine", str(tmp_path / "none"), *map(str, words))
        assert done.returncode == code, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "none").exists()
