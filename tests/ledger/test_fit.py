"""Which settings fit a budget: each, composed as it would be pasted, needs what is said and trains what is said."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from cli import SMALL, lowrank, write_rows
from deep import folder

from lowrank import assemble, compose
from lowrank.assemble import Parts
from lowrank.errors import ConfigError
from lowrank.ledger import predict, trials
from lowrank.ledger.fit import Search, Setting, fits
from lowrank.ledger.room import budget, gib, room
from lowrank.schema import Loop

MORE = ("loop.micro_batch=6", "eval.generate.limit=0", "eval.limit=2", "data.max_length=400")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    tmp = tmp_path_factory.mktemp("fit")
    rows = write_rows(tmp / "rows.jsonl", 40)
    return (*SMALL, "model=hf", f"model.name={folder(tmp / 'llama')}", f"data.path={rows}", *MORE)


@pytest.fixture(scope="module")
def searched(overrides: tuple[str, ...]) -> tuple[Search, list[Setting]]:
    """What fits the memory of a third of the micro-batch."""
    config = compose.compose(list(overrides))
    parts = assemble.parts(config)
    search = Search(parts, assemble.data(config, parts.tokenizer), 0)
    third = trials.with_loop(search.start, {"micro_batch": 2, "accumulate": 3})
    search.budget = search.setting(third).ledger.peak
    assert search.budget < search.own.ledger.peak
    return search, search.found(None)


@pytest.mark.slow
def test_what_is_listed_fits_when_it_is_pasted(
    overrides: tuple[str, ...], searched: tuple[Search, list[Setting]]
) -> None:
    search, found = searched
    assert found
    for setting in found:
        config = compose.compose([*overrides, *setting.overrides])
        parts = assemble.parts(config)
        ledger = predict(parts, assemble.data(config, parts.tokenizer))
        grown = ledger.parts["interpreter"] - setting.ledger.parts["interpreter"]
        assert ledger.peak - grown == setting.ledger.peak <= search.budget, str(setting)


def test_the_fastest_is_first_and_what_trains_otherwise_says_so(
    overrides: tuple[str, ...], searched: tuple[Search, list[Setting]]
) -> None:
    _, found = searched
    assert [one.speed for one in found] == sorted((one.speed for one in found), reverse=True)
    asked = compose.compose(list(overrides))
    for setting in found:
        config = compose.compose([*overrides, *setting.overrides])
        assert step(config.loop) == step(asked.loop)
        same = (config.quant.kind, config.optim.target, config.data) == (
            asked.quant.kind,
            asked.optim.target,
            asked.data,
        )
        assert same != bool(setting.changes), str(setting)


def test_with_room_for_it_the_configuration_itself_is_listed_and_nothing_that_trains_otherwise(
    searched: tuple[Search, list[Setting]],
) -> None:
    search, _ = searched
    found = fits(recomputed(search), search.start.data, 2**50)
    assert found[0].overrides == ()
    assert not any(one.changes for one in found)


def test_where_nothing_fits_the_least_that_was_tried_is_known(searched: tuple[Search, list[Setting]]) -> None:
    search, _ = searched
    tight = Search(recomputed(search), search.start.data, 1)
    assert tight.found(None) == []
    least = min(tight.known.values(), key=lambda one: one.ledger.peak)
    assert least.ledger.peak < tight.own.ledger.peak


def recomputed(search: Search) -> Parts:
    """Of which fewer settings are tried."""
    loop = replace(search.parts.config.loop, gradient_checkpointing="block")
    return replace(search.parts, config=replace(search.parts.config, loop=loop))


def step(loop: Loop) -> int:
    return (loop.micro_batch or loop.micro_batch_tokens or 0) * loop.accumulate


@cache
def plain() -> Loop:
    return compose.compose([]).loop


@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (6, 2), (1, 1), (7, 3)])
def test_a_step_is_cut_in_every_way_that_keeps_its_batch(size: int, accumulate: int) -> None:
    loop = Loop(**{**vars(plain()), "micro_batch": size, "accumulate": accumulate})
    ways = [(one["micro_batch"], one["accumulate"]) for one in trials.micro_batches(loop, None)]
    whole = size * accumulate
    assert ways == [(n, whole // n) for n in range(whole, 0, -1) if whole % n == 0]


def test_a_budget_of_tokens_is_halved_and_doubled() -> None:
    loop = Loop(**{**vars(plain()), "micro_batch": None, "micro_batch_tokens": 12, "accumulate": 4})
    ways = [(one["micro_batch_tokens"], one["accumulate"]) for one in trials.micro_batches(loop, None)]
    assert ways == [(48, 1), (24, 2), (12, 4), (6, 8), (3, 16)]


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("800MB", 8 * 10**8), ("1.5 TiB", 3 * 2**39)]
)
def test_a_budget_is_a_size_with_its_unit(text: str, size: int) -> None:
    assert budget(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "24G", "-1GB", "0MB", "24 gigabytes", "1e3MB", "nanGB", ""])
def test_anything_else_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--budget: '.*' is not allowed; a size .* 24GiB, 24GB or 800MB\.$"):
        budget(text)


def test_a_process_has_room_for_what_it_holds_and_no_more_than_the_machine_has() -> None:
    there = room(torch.device("cpu"))
    assert 10**8 < there <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 1.1
    assert gib(19.8 * 2**30) == "19.8 GiB"
    assert gib(2**29) == "512 MiB"


@pytest.mark.usefixtures("cache")
def test_the_command_lists_what_fits_and_refuses_a_budget_that_is_none(rows: Path) -> None:
    arguments = (
        "plan",
        "--no-speed",
        "loop.gradient_checkpointing=block",
        *SMALL,
        "model=tiny_llama",
        f"data.path={rows}",
    )
    listed = lowrank(*arguments, "--budget", "24GiB")
    assert listed.returncode == 0, listed.stderr
    assert "fit 24.0 GiB, the fastest first" in listed.stdout
    assert "as it is" in listed.stdout
    refused = lowrank(*arguments, "--budget", "24")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("--budget: '24' is not allowed; a size")
