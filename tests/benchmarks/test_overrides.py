"""Override strings at random end in a configuration or in a sentence; benchmarks/torture.py has a hundred thousand."""

from __future__ import annotations

from random import Random

from benchmarks.ordeals import overrides


def test_two_thousand_override_strings_end_in_no_traceback() -> None:
    accepted, failures = 0, []
    for start in range(0, 2000, overrides.CHUNK):
        taken, faults = overrides.chunk_of(7, (start, overrides.CHUNK), alone=0.8)
        accepted, failures = accepted + taken, failures + faults
    assert failures == []
    assert 100 < accepted < 1900  # neither nonsense alone nor commonplaces


def test_the_strings_are_of_every_kind() -> None:
    drawn = [overrides.override(Random(f"1 {number}")) for number in range(3000)]
    for piece in (
        "choice(",
        "range(",
        "glob(",
        "${",
        "[",
        "{",
        "'",
        "~",
        "++",
        "experiment=",
        "model=",
        "hydra.",
        "日本",
    ):
        assert sum(piece in text for text in drawn) > 5, piece
    assert len(set(drawn)) > 2400


def test_what_is_composed_once_is_what_is_composed_each_time() -> None:
    strings = ["loop.steps=3", "+optim.amsgrad=true", "adapter.r=0", "model=tiny_gpt2", "optim.lrr=1", "~loop.seed"]
    told = [overrides.read(text, alone=False) for text in strings]
    with overrides.composed_once():
        assert [overrides.read(text, alone=False) for text in strings] == told
        assert overrides.compose.compose(["loop.steps=7"]) == overrides.compose.compose(["loop.steps=7"])
    assert told == ["accepted", "accepted", "refused", "accepted", "refused", "refused"]
