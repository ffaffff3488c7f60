"""``lowrank compare``: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lowrank.compare.groups import SEEDS


def comparing(command: argparse.ArgumentParser) -> None:
    command.add_argument("outputs", nargs="+", type=Path, help="run directories, or folders that hold some")
    command.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a figure of summary.json (eval.after.loss); several",
    )
    command.add_argument(
        "--keys",
        type=names,
        default=(),
        metavar="KEY,…",
        help="configuration keys as columns; all: every one that differs",
    )
    command.add_argument(
        "--group-over", type=names, default=SEEDS, metavar="KEY,…", help=f"what only repeats a run ({','.join(SEEDS)})"
    )
    command.add_argument(
        "--sort", default="", metavar="NAME", help="a figure or a key (the first metric, the best first)"
    )
    command.add_argument("--reverse", action="store_true", help="the other way round")
    command.add_argument(
        "--against",
        default="best",
        metavar="GROUP",
        help="measure differences from: best, first, a run, or KEY=VALUE,…",
    )
    command.add_argument(
        "--higher", action="append", default=[], metavar="NAME", help="a metric of which more is better"
    )
    command.add_argument("--csv", type=Path, metavar="FILE", help="write a row a group")
    command.add_argument("--parquet", type=Path, metavar="FILE", help="the same as Parquet; needs lowrank[parquet]")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, which loads nothing else")
    command.add_argument("--heat", nargs=2, default=(), metavar="KEY", help="the two keys of the page's heat map")


def names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def compare(arguments: Any) -> None:
    """Raises ConfigError for folders without runs, and for a metric, key or group that they have not."""
    from lowrank.compare import table
    from lowrank.compare.files import write_csv, write_parquet
    from lowrank.compare.groups import gather
    from lowrank.compare.page import write_page
    from lowrank.compare.ranking import Choice, ranked

    choice = Choice(
        metrics=tuple(arguments.metric),
        keys=arguments.keys,
        sort=arguments.sort,
        reverse=arguments.reverse,
        against=arguments.against,
        higher=tuple(arguments.higher),
    )
    ranking = ranked(gather(arguments.outputs, arguments.group_over), choice)
    table.show(ranking)
    if arguments.csv:
        print(write_csv(ranking, arguments.csv))
    if arguments.parquet:
        print(write_parquet(ranking, arguments.parquet))
    if arguments.html:
        print(write_page(ranking, arguments.html, tuple(arguments.heat)))
