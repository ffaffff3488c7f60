"""``optim.in_backward`` and the paged optimizers as a user asks for them: what is refused, what a run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli import SMALL
from resuming import SHORT, differing, ended, killed, resumed

import lowrank
from lowrank.compose import compose
from lowrank.errors import ConfigError

pytestmark = pytest.mark.usefixtures("cache")
IN_BACKWARD = ("optim.in_backward=true", "loop.max_grad_norm=.inf")
FULL = ("adapter=full", "model=tiny_llama", "optim.lr=1e-3")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (("optim.in_backward=true",), r"unless loop\.max_grad_norm=\.inf"),
        ((*IN_BACKWARD, "loop.accumulate=2"), r"unless loop\.accumulate=1"),
        ((*IN_BACKWARD, "loop.precision=fp16"), r"unless loop\.precision is bf16"),
    ],
    ids=["clipping", "accumulation", "fp16"],
)
def test_what_needs_all_gradients_at_once_is_refused(overrides: tuple[str, ...], wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"^optim\.in_backward: true is not allowed; false, {wanted}"):
        compose(overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("adapter=adalora", *IN_BACKWARD), "optim.in_backward: true is not allowed; false, because AdaLoRA needs all"),
        (("optim=paged_adamw8bit",), "PagedAdamW8bit keeps its state in the host's memory while a GPU does not"),
        (("optim=paged_adamw32bit",), "PagedAdamW32bit keeps its state in the host's memory while a GPU does not"),
    ],
)
def test_a_method_or_an_optimizer_that_cannot_is_refused_before_a_weight_is_read(
    overrides: tuple[str, ...], said: str, rows: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ConfigError) as caught:
        lowrank.train([*SMALL, f"data.path={rows}", "model=tiny_llama", *overrides], folder)
    assert said in str(caught.value)
    assert not folder.exists()


def test_a_run_that_moves_within_backward_ends_as_one_that_does_not_and_resumes(rows: Path, tmp_path: Path) -> None:
    both = [*SHORT, f"data.path={rows}", *FULL, "loop.max_grad_norm=.inf", "loop.fast=false"]
    plain = lowrank.train(both, tmp_path / "plain")
    overrides = [*both, "optim.in_backward=true"]
    whole = lowrank.train(overrides, tmp_path / "whole")
    assert whole.summary["hashes"] == plain.summary["hashes"]
    assert whole.summary["fast"].endswith("; optimizer in backward (AdamW)")
    resumed(killed(tmp_path / "whole", tmp_path / "run", at=3), *overrides)
    assert differing(ended(tmp_path / "whole"), ended(tmp_path / "run")) == []
