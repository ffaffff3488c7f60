"""Combining adapters: what is written is what was asked for, or says by how much it is not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from banks import furthest, logits
from safetensors.torch import load_file, save_file
from sums import KINDS, error, of, same_files, saved, weighted
from torch import nn

from lowrank.adapters import LoRA
from lowrank.adapters.base import dense_weight
from lowrank.adapters.combine import combine
from lowrank.adapters.sites import adapted, sites
from lowrank.adapters.store import load_adapter
from lowrank.export.peft import export_peft
from lowrank.keys import key

Make = Callable[..., Any]


@pytest.fixture(params=["make_llama", "make_gpt2"])
def make(request: pytest.FixtureRequest) -> Make:
    """Either architecture."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def three(make: Make, tmp_path: Path) -> list[Path]:
    return [saved(make, tmp_path, rules, name) for name, rules in KINDS.items()]


# Sums


def test_a_sum_is_exact_at_every_site_of_any_of_them(make: Make, three: list[Path], tmp_path: Path) -> None:
    weights = [0.7, -1.3, 2.0]
    report = combine(three, weights, tmp_path / "sum")
    wanted, found = weighted(make, three, weights), of(make, tmp_path / "sum")
    assert found.keys() == wanted.keys()
    assert max(error(found[path], wanted[path]) for path in wanted) <= 1e-6
    assert report.worst.error <= 1e-6
    ranks = {site.path: site.rank for site in report.sites}
    assert {path: site.adapter.r for path, site in adapted(load_adapter(make(), tmp_path / "sum"))} == ranks
    assert sorted(set(ranks.values())) == [2, 3, 7]  # a head, or embeddings, alone; all but those; three together


def test_the_combined_model_computes_base_plus_the_sum(make: Make, three: list[Path], tmp_path: Path) -> None:
    ids = torch.arange(12).view(2, 6)
    combine(three, [0.5, 0.5, 0.5], tmp_path / "sum")
    plain = make()
    for path, change in weighted(make, three, [0.5, 0.5, 0.5]).items():
        base = dict(sites(plain))[path]
        untied = dense_weight(base).detach() + change.float()  # (out, in)
        values = untied if isinstance(base, nn.Linear) else untied.T
        base.weight = nn.Parameter(values.contiguous())
    assert furthest(logits(load_adapter(make(), tmp_path / "sum"), ids), logits(plain, ids)) <= 1e-5


def test_what_is_taken_away_is_gone(make: Make, three: list[Path], tmp_path: Path) -> None:
    combine(three[:2], [1.0, 1.0], tmp_path / "both")
    combine([tmp_path / "both", three[1]], [1.0, -1.0], tmp_path / "left")
    wanted, found = of(make, three[0]), of(make, tmp_path / "left")
    assert found.keys() == wanted.keys()
    assert max(error(found[path], wanted[path]) for path in wanted) <= 1e-6


@pytest.mark.parametrize("settings", [{}, {"rank": 1}, {"method": "ties"}, {"method": "dare", "density": 1.0}])
def test_where_nothing_is_left_the_error_is_measured_by_what_cancelled(
    settings: dict[str, Any], make_llama: Make, tmp_path: Path
) -> None:
    one = saved(make_llama, tmp_path, {"all-linear": partial(LoRA, r=3)}, "one")
    report = combine([one, one], [1.0, -1.0], tmp_path / "none", **settings)
    assert report.worst.error <= 1e-12


@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
def test_pefts_combination_is_not_the_sum_and_ours_is(make_llama: Make, tmp_path: Path) -> None:
    from peft import PeftModel

    folders = [saved(make_llama, tmp_path, {"all-linear": partial(LoRA, r=8)}, name) for name in ("one", "two")]
    wanted = weighted(make_llama, folders, [0.3, 0.7])
    for name, folder in zip(("one", "two"), folders, strict=True):
        export_peft(load_adapter(make_llama(), folder), tmp_path / "peft" / name)
    theirs = PeftModel.from_pretrained(make_llama(), tmp_path / "peft" / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "peft" / "two", adapter_name="two")

    def peft(method: str) -> float:
        theirs.add_weighted_adapter(["one", "two"], [0.3, 0.7], method, combination_type=method)
        layers = {path: theirs.base_model.model.get_submodule(path) for path in wanted}
        return sum(error(layer.get_delta_weight(method), wanted[path]) for path, layer in layers.items()) / len(wanted)

    combine(folders, [0.3, 0.7], tmp_path / "ours")
    linear, svd = peft("linear"), peft("svd")
    assert linear > 0.5
    assert svd > 0.2
    found = of(make_llama, tmp_path / "ours")
    assert max(error(found[path], wanted[path]) for path in wanted) <= 1e-6


# Cut to a rank


def test_a_rank_gives_the_best_approximation_and_its_true_error(make: Make, three: list[Path], tmp_path: Path) -> None:
    weights = [1.0, 0.5, -0.8]
    report = combine(three, weights, tmp_path / "cut", rank=3)
    wanted, found = weighted(make, three, weights), of(make, tmp_path / "cut")
    errors = {site.path: site.error for site in report.sites}
    for path, change in wanted.items():
        S = torch.linalg.svdvals(change)
        best = float(S[3:].norm() / S.norm())
        assert abs(error(found[path], change) - best) <= 1e-6, path
        assert abs(errors[path] - best) <= 1e-6, path
    assert 0.01 < report.mean_error <= report.worst.error == max(errors.values())
    assert all(site.rank <= 3 for site in report.sites)


# Ties and dare


@pytest.mark.filterwarnings("ignore")
def test_ties_of_equal_weights_is_pefts(make: Make, three: list[Path], tmp_path: Path) -> None:
    from peft.utils.merge_utils import ties

    report = combine(three, [0.8] * 3, tmp_path / "ties", method="ties", density=0.25, rank=32)
    found, parts = of(make, tmp_path / "ties"), [of(make, folder) for folder in three]
    for site in report.sites:
        tensors = [part[site.path] for part in parts if site.path in part]
        wanted = ties(tensors, torch.full((len(tensors),), 0.8), 0.25)
        assert error(found[site.path], wanted) <= 1e-6
        assert site.error <= 1e-6


def test_ties_by_hand() -> None:
    from lowrank.adapters.algebra import ties

    one, two = torch.tensor([[4.0, -3.0], [0.1, 2.0]]), torch.tensor([[2.0, 5.0], [0.2, 0.1]])
    # of each the two largest: 4, −3 and 2, 5; signs of the sums: + and +; the mean of what has that sign
    assert torch.equal(ties([one, two], [1.0, 1.0], 0.5), torch.tensor([[3.0, 5.0], [0.0, 0.0]]))
    # weighted 1 and −1: 4, −3 and −2, −5: + and −
    assert torch.equal(ties([one, two], [1.0, -1.0], 0.5), torch.tensor([[4.0, -4.0], [0.0, 0.0]]))


def test_dare_keeps_a_drawn_share_and_scales_it_up(make: Make, three: list[Path], tmp_path: Path) -> None:
    density = 0.3
    combine(three[:1], [2.0], tmp_path / "dare", method="dare", density=density, rank=64)
    wanted, found = of(make, three[0]), of(make, tmp_path / "dare")
    share = torch.cat([(found[path] / wanted[path]).flatten() for path in wanted])
    kept = share.abs() > 1e-2
    assert float((share[kept] - 2 / density).abs().max()) <= 2e-2
    assert abs(float(kept.double().mean()) - density) < 0.01  # of about 30,000 entries
    first = combine(three[:1], [2.0], tmp_path / "again", method="dare", density=density)
    assert same_files(tmp_path / "again", combine_again(three, tmp_path / "same", density, seed=0))
    assert not same_files(tmp_path / "again", combine_again(three, tmp_path / "other", density, seed=1))
    assert first.mean_error > 0.3  # random holes are not of rank 2


def combine_again(three: list[Path], where: Path, density: float, seed: int) -> Path:
    return combine(three[:1], [2.0], where, method="dare", density=density, seed=seed).folder


def test_dare_draws_for_each_adapter_apart(make_llama: Make, tmp_path: Path) -> None:
    """One adapter twice is not one mask twice: where both masks keep an entry it is twice what one keeps."""
    folder = saved(make_llama, tmp_path, {"q_proj": partial(LoRA, r=4)}, "one")
    combine([folder, folder], [1.0, 1.0], tmp_path / "dare", method="dare", density=0.5, rank=32)
    wanted, found = of(make_llama, folder), of(make_llama, tmp_path / "dare")
    share = torch.cat([(found[path] / wanted[path]).flatten() for path in wanted]).round().long()
    counts = torch.bincount(share.clamp(0, 4), minlength=5).double() / len(share)
    assert torch.allclose(counts[[0, 2, 4]], torch.tensor([0.25, 0.5, 0.25]).double(), atol=0.04)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_keeping_everything_of_one_changes_nothing(method: str, make: Make, three: list[Path], tmp_path: Path) -> None:
    report = combine(three[:1], [1.0], tmp_path / "all", method=method, density=1.0)
    wanted, found = of(make, three[0]), of(make, tmp_path / "all")
    assert max(error(found[path], wanted[path]) for path in wanted) <= 1e-6
    assert report.worst.error <= 1e-6


def test_the_draw_of_a_site_does_not_depend_on_the_other_sites(make_llama: Make, tmp_path: Path) -> None:
    folders = [
        saved(make_llama, tmp_path, rules, str(n)) for n, rules in enumerate(({"v_proj": LoRA}, {"*_proj": LoRA}))
    ]
    values = torch.randn(8, 32, generator=key(0, "A")), torch.randn(16, 8, generator=key(0, "B"))
    found = []
    for folder in folders:
        tensors = load_file(folder / "adapter.safetensors")
        for name, value in zip("AB", values, strict=True):
            tensors[f"model.layers.1.self_attn.v_proj.adapter.{name}"] = value
        save_file(tensors, folder / "adapter.safetensors")
        combine([folder], [1.0], folder / "dare", method="dare")
        found.append(of(make_llama, folder / "dare")["model.layers.1.self_attn.v_proj"])
    assert torch.equal(*found)
