"""The comparison as a file for other programs: one row a group over seeds, plain numbers, dotted names."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lowrank.compare.keys import ABSENT, plain, written
from lowrank.compare.ranking import Ranking, Row
from lowrank.disk import write_text
from lowrank.errors import ConfigError
from lowrank.report.figures import clean

EXTRA = "needs pyarrow, which is not installed: pip install 'lowrank[parquet]', or take --csv"


def records(ranking: Ranking) -> list[dict[str, Any]]:
    """A row a group. A key has its own value (None where the group has not the key, ``null`` where it is null); of each
    metric ``.mean`` ``.low`` ``.high`` ``.n``, and of its difference from the reference ``.difference`` …, ``.p``."""
    keys = ranking.keys if ranking.choice.keys else ranking.results.differing
    return [record(ranking, row, keys) for row in ranking.rows]


def record(ranking: Ranking, row: Row, keys: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {key: row.group.keys.get(key, ABSENT) for key in keys}
    found["runs"] = len(row.group.runs)
    for metric in ranking.metrics:
        found |= figures(metric, row)
    found["reference"] = row.reference
    found |= {f"front.{cost}": cost in row.fronts for cost in ranking.costs}
    found["folders"] = "; ".join(run.name for run in row.group.runs.values())
    return found


def figures(metric: str, row: Row) -> dict[str, float | int | None]:
    estimate, tested = row.estimates[metric], row.tested[metric]
    difference = tested.difference if tested else None
    return {
        f"{metric}.mean": estimate.mean if estimate else None,
        f"{metric}.low": estimate.low if estimate else None,
        f"{metric}.high": estimate.high if estimate else None,
        f"{metric}.n": estimate.n if estimate else 0,
        f"{metric}.difference": difference.mean if difference else None,
        f"{metric}.difference.low": difference.low if difference else None,
        f"{metric}.difference.high": difference.high if difference else None,
        f"{metric}.difference.n": difference.n if difference else None,
        f"{metric}.p": difference.p if difference else None,
        f"{metric}.p_holm": tested.p if tested else None,
        f"{metric}.p_exact": difference.exact if difference else None,
    }


def write_csv(ranking: Ranking, path: Path) -> Path:
    """What is unknown is an empty field, of a key as of a figure."""
    rows = records(ranking)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(list(rows[0]) if rows else ["runs"])
    keys = set(ranking.results.differing) | set(ranking.keys)
    writer.writerows([[field(value, name in keys) for name, value in row.items()] for row in rows])
    return write_text(path, text.getvalue())


def field(value: Any, key: bool) -> str:
    if value is None and not key:
        return ""
    return plain(value) if isinstance(value, float) else clean(written(value))


def write_parquet(ranking: Ranking, path: Path) -> Path:
    """The same columns; a key's is of numbers where all its values are. Raises ConfigError without pyarrow."""
    try:
        import pyarrow  # type: ignore[import-not-found,import-untyped,unused-ignore]
        import pyarrow.parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise ConfigError(f"--parquet {path}: {EXTRA}.") from error
    rows = records(ranking)
    names = list(rows[0]) if rows else ["runs"]
    keys = set(ranking.results.differing) | set(ranking.keys)
    columns = {name: column([row[name] for row in rows], name in keys) for name in names}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def column(values: list[Any], key: bool) -> list[Any]:
    if not key:
        return values
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return [float(value) for value in values] if any(isinstance(v, float) for v in values) else values
    return [None if value == ABSENT else clean(written(value)) for value in values]
