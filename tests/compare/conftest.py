"""One trained run and the sweep made of it, for all tests of the comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli import write_rows
from sweeping import grid, trained


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    return trained(folder / "run", write_rows(folder / "rows.jsonl"))


@pytest.fixture(scope="session")
def sweep(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grid(original, tmp_path_factory.mktemp("sweep") / "grid")
