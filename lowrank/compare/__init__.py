"""Many runs beside each other: grouped over seeds, weighed against one another, in a table, a file and a page."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path


def write(folder: Path, metric: str | None = None) -> Path:
    """``sweep.html`` in a sweep's folder, from the runs below it; its path.

    Looking at a sweep is no reason for it to fail: what goes wrong is shown on standard error, and nothing is raised.
    ``metric`` is the figure by which the runs are ranked, where it is not the held-out loss.
    """
    path = Path(folder) / "sweep.html"
    try:
        from lowrank.compare.groups import gather
        from lowrank.compare.page import write_page
        from lowrank.compare.ranking import Choice, ranked

        results = gather([folder])
        known = metric is not None and (not results.groups or metric in results.metrics())
        write_page(ranked(results, Choice(metrics=(metric,) if metric and known else ())), path)
    except Exception:
        print(f"no {path}:\n{traceback.format_exc()}", file=sys.stderr)
    return path
