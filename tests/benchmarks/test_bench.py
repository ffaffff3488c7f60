"""The benchmarks' own arithmetic: texts, predictions, counted bytes, rows, tables; and the whole script, small."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank
from benchmarks import curves, goals, pieces, predict, results, tables
from benchmarks.pieces import TINY, Curve, Piece
from benchmarks.saved import Saved
from benchmarks.shapes import SHAPES, Shape, Texts, spread
from lowrank.adapters import LoRA
from lowrank.data import chat, sources
from lowrank.data.pack import pack
from lowrank.models import attention
from lowrank.models.tiny import byte_tokenizer
from lowrank.train.loss import target_loss
from tests.documents import texts

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "benchmarks" / "README.md"
ABOUT = {"device": "cpu", "commit": "abc", "threads": 1, "cpu": "c", "cores": 2}
ABOUT |= {"flags": [], "versions": {}, "command": "x"}


@pytest.mark.parametrize("share", [0.05, 0.125, 0.75])
def test_a_text_has_the_tokens_and_the_targets_that_were_asked_for(share: float, tmp_path: Path) -> None:
    path = Texts((60, 64, 200), 6, share).write(tmp_path)
    rows = [sources.Record(n, json.loads(line)) for n, line in enumerate(path.read_text().splitlines())]
    found, _ = chat.examples(
        rows, byte_tokenizer(adds_bos=True), template="instruction", train_on="response", max_length=999
    )
    assert [len(example.tokens) for example in found] == [60, 64, 200, 60, 64, 200]
    targets = sum(sum(example.target) for example in found)
    if share < 0.5:  # more does not fit beside the template's own tokens in the short ones
        assert targets == pytest.approx(share * 648, abs=6)


def test_lengths_of_one_mean_spread_as_asked() -> None:
    deviations = []
    for deviation in (0.0, 0.4, 0.8):
        lengths = torch.tensor(spread(170, deviation, 64, 1024), dtype=torch.float64)
        assert float(lengths.mean()) == pytest.approx(170, rel=0.02)
        deviations.append(float(lengths.log().std()))
    assert deviations == sorted(deviations)
    assert deviations[0] == 0.0
    assert deviations[2] > 0.6


def test_a_layer_more_with_adapters_costs_the_products_that_torch_counts() -> None:
    """Of layers 2 and 3 alone: the lowest adapted one does not hand a gradient on, whichever it is."""
    shape, tokens, r = SHAPES["tiny"], 24, 4

    def counted(top: int) -> float:
        torch.manual_seed(0)
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(shape.config).requires_grad_(False)
        assert attention.install(model) is None
        where = f"all-linear@{shape.layers - top}-{shape.layers - 1}"
        lowrank.apply(model, lowrank.plan(model, {where: partial(LoRA, r=r)}))
        # torch does not count products that are added in place
        in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            target_loss(model, pack(texts([tokens]))).backward()
        by_kind: dict[Any, int] = counter.get_flop_counts()["Global"]
        return sum(count for kind, count in by_kind.items() if "attention" not in str(kind))

    predicted = [predict.step(shape, tokens, tokens, r, top=top).products for top in (4, 2)]
    assert counted(4) - counted(2) == predicted[0] - predicted[1]


def test_attention_costs_grow_with_a_documents_length_and_products_do_not() -> None:
    short, long = (predict.step(SHAPES["1b"], 8192, s, 16) for s in (1024, 4096))
    assert short.products == long.products
    assert long.attention == 4 * short.attention


@pytest.mark.parametrize("parameters", [True, False])
def test_a_saved_storage_counts_once_until_it_is_let_go_and_a_parameters_never(parameters: bool) -> None:
    saved, x, model = Saved(), torch.randn(10, 10, requires_grad=True), nn.Linear(10, 10, bias=False)
    saved.begin(model if parameters else nn.Module())
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        for _ in range(2):  # what the first kept is gone when the second keeps as much
            h = model(x)  # keeps x and the weight
            (h * h.T).sum().backward()  # keeps h, twice
    assert saved.most == (2 if parameters else 3) * x.nbytes


def row(**changes: Any) -> dict[str, Any]:
    made = {"arm": "lowrank", "round": 1, "others": 0.0, "precision": "fp32", "tokens": 7, "trained": 3}
    return made | {"lrs": [1.0], "hashes": ["a"], "losses": [2.0], "tokens_per_s": 5.0} | changes


def peers(tmp_path: Path) -> Piece:
    return next(piece for piece in pieces.cpu(tmp_path, TINY) if piece.name == "peers")


@pytest.mark.parametrize(
    ("change", "grouped"),
    [
        ({"hashes": ["b"]}, False),
        ({"lrs": [0.9]}, False),
        ({"losses": [2.1]}, False),
        ({"losses": [float("nan")]}, False),
        ({"trained": 4}, True),
        ({"tokens": 8}, True),
    ],
)
def test_arms_that_did_not_do_the_same_work_are_not_compared(
    change: dict[str, Any], grouped: bool, tmp_path: Path
) -> None:
    piece = peers(tmp_path)
    name = goals.GROUPED if grouped else goals.TRAINER
    with pytest.raises(SystemExit, match="did not do the same work"):
        results.refuse_different_work(piece, [row(), row(arm=name, **change)])
    results.refuse_different_work(piece, [row(), row(arm=name)])
    results.refuse_different_work(piece, [row(), row(arm=goals.GROUPED, losses=[9.0], hashes=["b"])])


def test_a_broken_run_goes_on_and_one_elsewhere_begins_anew(tmp_path: Path) -> None:
    file = results.File(tmp_path / "peers.jsonl")
    assert file.begin(ABOUT) == 0
    file.append([row(), row(round=2)])
    assert file.begin({**ABOUT, "command": "another"}) == 2
    assert file.begin({**ABOUT, "commit": "other"}) == 0
    assert file.rows == []


def test_out_of_memory_and_absence_are_results_and_other_failures_are_not() -> None:
    from benchmarks.processes import failure

    assert failure(1, "torch.OutOfMemoryError: CUDA out of memory.", "m") == "out of memory"
    assert failure(3, "not installed: No module named 'trl'", "m") == "not installed"
    with pytest.raises(SystemExit, match="m: exit code 1"):
        failure(1, "KeyError", "m")


def found(ours: list[float], theirs: list[float], **more: Any) -> dict[str, Any]:
    arms = {goals.OURS: {"tokens_per_s": ours}, goals.TRAINER: {"tokens_per_s": theirs}}
    return {"peers": {"about": {**ABOUT, "others": 0.0}, "arms": arms, **more}}


def test_a_goal_is_met_by_the_median_of_ratios_taken_round_by_round() -> None:
    first = goals.TABLE[0]
    assert first.row(found([30.0, 80.0, 30.0], [10.0, 20.0, 15.0])).endswith("| 3.00× (2.00–4.00) | met |")
    assert first.row(found([20.0], [10.0])).endswith("| 2.00× | missed |")
    assert first.row({}).endswith("| | unmeasured |")
    assert all(goal.row({}).endswith("unmeasured |") for goal in (*goals.TABLE, *goals.CURVES, *goals.CUDA))


def test_an_arm_that_failed_is_no_figure(tmp_path: Path) -> None:
    piece = peers(tmp_path)
    file = results.File(tmp_path / "rows.jsonl")
    file.begin(ABOUT)
    file.append([row(), {"arm": goals.TRAINER, "round": 1, "others": 0.5, "failed": "out of memory"}])
    summed = results.summary(piece, file)
    assert summed["arms"][goals.TRAINER] == {"failed": ["out of memory"]}
    assert goals.TABLE[0].row({"peers": summed}).endswith("unmeasured |")
    assert "| PEFT + Trainer | out of memory |" in tables.details("peers", summed)


def curve(prediction: str, y: str, slope: float = 0.0) -> Curve:
    return Curve("t", "x", y, "l", prediction, slope)


def test_a_curve_is_predicted_through_its_first_point_by_flops_flat_or_by_a_slope() -> None:
    flops = [[10.0, 0.0], [10.0, 5.0]]
    of = partial(curves.predictions, x=[1.0, 3.0], first=8.0, slower=2.0)
    assert of(curve("flops", "seconds"), flops=flops) == [8.0, 16.0]
    assert of(curve("flops", "tokens_per_s"), flops=flops) == [8.0, 4.0]
    assert of(curve("flat", "seconds"), flops=[None, None]) == [8.0, 8.0]
    assert of(curve("line", "saved_mb", 3.0), flops=[None, None]) == [8.0, 14.0]


def test_the_distance_from_a_line_is_that_of_its_slope() -> None:
    drawn = curves.Drawn(curve("line", "saved_mb", 3.0), [1, 3], [100.0, 106.6], [], [], [100.0, 106.0])
    assert drawn.off == pytest.approx(0.1)
    assert replace(drawn, curve=curve("flat", "seconds")).off == pytest.approx(0.6 / 106)


def test_every_piece_of_either_list_has_a_name_of_its_own_and_every_goal_its_piece(tmp_path: Path) -> None:
    from benchmarks.cuda import cuda

    names = [piece.name for piece in (*pieces.cpu(tmp_path), *cuda(tmp_path))]
    assert len({*names}) == len(names) - 1  # rates is of both

    class Asked(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            asked.append(name)
            raise KeyError(name)

    asked: list[str] = []
    for goal in (*goals.TABLE, *goals.CURVES, *goals.CUDA):
        goal.measured(Asked())
    assert {*asked} <= {*names, "peers-bf16"}


def bench(*arguments: str) -> str:
    """What it told of its progress."""
    command = [sys.executable, "benchmarks/bench.py", "--tiny", "--threads=1", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_two_programs_train_the_same_and_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    folder = f"--results={tmp_path / 'rows'}"
    assert "losses 1/1 lowrank" in bench("losses", folder, f"--write={tmp_path}")
    piece = results.read(tmp_path / "results")["losses"]
    assert piece["apart"] < 1e-5
    assert [len(losses) for losses in piece["losses"].values()] == [5, 5]
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| losses of 50 steps apart from packed PEFT's | < 1e-5 |" in written
    assert written.partition("<!-- bench: ")[0] == README.read_text(encoding="utf-8").partition("<!-- bench: ")[0]
    assert "1/1" not in bench("losses", folder)


@pytest.mark.slow
def test_every_piece_runs_and_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "README.md").write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    bench(f"--results={tmp_path / 'rows'}", f"--write={tmp_path}")
    measured = results.read(tmp_path / "results")
    assert list(measured) == [piece.name for piece in pieces.cpu(tmp_path, TINY)]
    drawn = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert drawn == {name for name, piece in measured.items() if "curve" in piece}
    assert all(path.stat().st_size < 60_000 for path in (tmp_path / "plots").iterdir())
    assert goals.off("memory")(measured)[0] < 0.02  # bytes are exact, whatever the machine does meanwhile


def test_matrix_parameters_are_those_of_the_model() -> None:
    from transformers import LlamaForCausalLM

    for shape in (SHAPES["tiny"], Shape(64, 16, 96, 2, 4, 300)):
        with torch.device("meta"):
            model = LlamaForCausalLM(shape.config)
        layer = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
        widths = sum(sum(p.shape) for p in model.model.layers[0].parameters() if p.ndim == 2)
        assert (shape.layer, shape.rank_widths) == (layer, widths)
