"""The kit finds what it says it looks for: a right adapter passes, and each planted fault is caught by its name."""

from __future__ import annotations

import faults
import pytest

from lowrank.adapters import Adapter
from lowrank.testing.bases import columns
from lowrank.testing.conformance import PROPERTIES, Row, examine
from lowrank.testing.trial import Trial

# Exactly the properties that a fault breaks. What is built wrongly is tried no further.
CAUGHT_BY: dict[type[Adapter], set[str]] = {
    faults.KeepsItsBase: {"construction"},
    faults.NeedsValues: {"construction"},
    faults.StartsElsewhere: {"identity at start"},
    faults.UnfreezesTheBase: {"trainable parameters", "dropout replay", "save and load", "resume", "copies"},
    faults.DrawsFromTheDefaultGenerator: {
        *("keyed seeds", "independent starts", "dtypes and devices", "resume", "copies"),
    },
    faults.DependsOnOtherSites: {"independent starts"},
    faults.TransposesAGradient: {"site gradients", "model gradients"},
    faults.RoundsTheBase: {"base untouched", "removal"},
    faults.MergesAtAnotherScale: {"merge"},
    faults.MergesInPlace: {"merge"},
    faults.ComputesInFp32: {"dtypes and devices", "merge", "site gradients", "model gradients"},
    faults.HoldsAPlainTensor: {"dtypes and devices", "save and load"},
    faults.DropsInEvaluation: {"dropout replay", "fast path", "save and load"},
    faults.DropsUnkeyed: {"dropout replay", "fast path", "site gradients", "model gradients"},
    faults.CountsItsCalls: {"dropout replay", "checkpointing", "site gradients", "model gradients"},
    faults.LooksBack: {"packing", "generation"},
    faults.CountsPositionsAnew: {"packing", "generation"},
    faults.ForgetsAKey: {"save and load"},
    faults.LosesItsCountOnResume: {"resume"},
    faults.KeepsItsStrengthToItself: {"save and load", "resume"},
    faults.PatchesItsBase: {"removal", "copies"},
    faults.ComputesWithItsFirstSelf: {"copies"},
}


def examined_on_gpt2(cls: type[Adapter]) -> list[Row]:
    base = next(base for base in columns(cls) if base.model == "gpt2")
    return examine(Trial(cls, base))


def failures(rows: list[Row]) -> dict[str, str]:
    return {row.property: row.detail for row in rows if row.verdict == "FAIL"}


@pytest.mark.parametrize("cls", [faults.Right, faults.OnBlocks], ids=lambda cls: cls.__name__)
def test_the_right_one_passes(cls: type[Adapter]) -> None:
    rows = examined_on_gpt2(cls)
    assert failures(rows) == {}
    assert {row.property for row in rows} == set(PROPERTIES)


@pytest.mark.parametrize("cls", CAUGHT_BY, ids=lambda cls: cls.__name__)
def test_a_planted_fault_is_caught_and_named(cls: type[Adapter]) -> None:
    found = failures(examined_on_gpt2(cls))
    assert found.keys() == CAUGHT_BY[cls], found


def test_every_property_catches_something() -> None:
    assert set.union(*CAUGHT_BY.values()) == set(PROPERTIES)
