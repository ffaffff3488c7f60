"""What one process of a benchmark tells of itself."""

from __future__ import annotations

from benchmarks.arm import Result

RESULT = Result(
    arm="lowrank",
    losses=[3.0, 2.0, 1.0],
    lrs=[3e-4, 2e-4, 1e-4],
    seconds=[9.0, 1.0, 3.0],
    real_tokens=[50, 100, 300],
    positions=[64, 128, 512],
    token_hashes=["a", "b", "c"],
    trainable_parameters=7,
    peak_mb=1000.0,
    threads=1,
    versions={},
)


def test_warm_up_steps_and_padding_do_not_count_in_the_speed() -> None:
    assert RESULT.tokens_per_s(warmup=1) == (100 + 300) / (1.0 + 3.0)
