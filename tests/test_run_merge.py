"""``lowrank merge RUN FOLDER``: measured and calibrated on the run's own tokens, also where these are gone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SMALL, write_rows
from transformers import AutoModelForCausalLM

import lowrank
from lowrank import assemble, cli
from lowrank.errors import RefusedError
from lowrank.run import rows_of

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 200)


def train(rows: Path, folder: Path, *overrides: str) -> Any:
    given = ["model=tiny_llama", "loop.steps=20", "optim.lr=1e-2", "eval.before=false", *overrides]
    return lowrank.train([*SMALL, f"data.path={rows}", *given], folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Any:
    return train(rows, tmp_path_factory.mktemp("run") / "run", "quant=nf4")


def test_probes_are_held_out_and_calibration_is_trained_on(run: Any) -> None:
    found = lowrank.open(run.folder).probes()
    data = assemble.data(run.config, run.tokenizer)
    held, trained = ({tuple(example.tokens) for example in part} for part in (data.eval, data.train))
    assert found["calibration"].shape == (64, 128)
    assert found["probe"].shape[1] == 128
    for name, own, other in (("probe", held, trained), ("calibration", trained, held)):
        whole = set(documents(found[name].flatten().tolist(), run.tokenizer.bos_token_id))
        assert whole
        assert whole <= own - other


def documents(ids: list[int], first: int) -> Iterator[tuple[int, ...]]:
    """The whole documents of tokens put end to end, each beginning with ``first``."""
    starts = [index for index, token in enumerate(ids) if token == first]
    return (tuple(ids[a:b]) for a, b in pairwise(starts))


def test_rows_are_drawn_from_the_whole_of_the_examples(run: Any) -> None:
    examples = assemble.data(run.config, run.tokenizer).train
    few = rows_of(examples, 4, 128)
    assert few.shape == (4, 128)
    found = set(documents(few.flatten().tolist(), run.tokenizer.bos_token_id))
    for quarter in range(4):
        part = examples[quarter * len(examples) // 4 : (quarter + 1) * len(examples) // 4]
        assert found & {tuple(example.tokens) for example in part}
    assert rows_of(examples[:1], 64, 128).shape == (1, len(examples[0].tokens))


def test_the_command_merges_into_nf4(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["merge", str(run.folder), str(tmp_path / "four"), "--to", "nf4"])
    printed = capsys.readouterr().out
    assert printed.startswith("merged 14 sites\n")
    assert "share of the adapter's effect that survives there: 0." in printed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "four")
    assert type(merged.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"


def test_the_command_refuses_below_a_share_that_is_asked_for(run: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["merge", str(run.folder), str(tmp_path / "out"), "--to", "nf4", "--min-share", "0.999"])
    assert stopped.value.code == RefusedError.exit_code
    assert not (tmp_path / "out").exists()


def test_where_the_data_is_gone_random_tokens_stand_in_and_the_report_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    gone = train(rows, tmp_path / "run", "loop.steps=2")
    rows.unlink()
    cli.main(["merge", str(gone.folder), str(tmp_path / "out")])
    assert "the run's data cannot be read (" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_fully_tuned_run_merges_dense(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = train(rows, tmp_path / "run", "adapter=full", "loop.steps=2", "optim.lr=1e-3")
    cli.main(["merge", str(full.folder), str(tmp_path / "out")])
    assert capsys.readouterr().out.startswith("merged 0 sites\n")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = lowrank.open(full.folder).model.state_dict()
    assert trained.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in plain.state_dict().items())
