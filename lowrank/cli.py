"""``lowrank``: what is done with a run directory, and a look at data and plans before there is one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowrank import compose
from lowrank.commands.bench import bench, measuring
from lowrank.commands.examples import EXAMPLES, examples
from lowrank.commands.talk import chat, generate, opened
from lowrank.compare.command import compare, comparing
from lowrank.errors import ConfigError, RefusedError


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: prints one block for an error we understand and exits with its code."""
    top = parser()
    parsed, rest = top.parse_known_args(arguments)
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(parsed, "overrides")):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides that stand behind an option
        parsed.overrides += rest
    with compose.reporting():
        parsed.command(parsed)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="lowrank", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[Any], None], text: str, run: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=examples(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(command=command)
        if run:
            made.add_argument("run", type=Path, help="a run directory")
        return made

    looking(add("inspect", inspect, "look at data, a plan, or what an adapter has learnt", run=False))
    planning(add("plan", plan, "what a run would need, and how fast it would be; nothing is trained", run=False))
    one = add("generate", generate, "print the tuned model's text for a prompt")
    one.add_argument("prompt", help="the instruction, in the run's own template; - reads it from standard input")
    one.add_argument("--input", default="", help="the template's input block")
    sampling(one)
    sampling(add("chat", chat, "talk to the tuned model"))

    held = add("evaluate", evaluate, "held-out loss and scores, on the run's data or other")
    held.add_argument("overrides", nargs="*", help="data=… and eval.… keys to change")

    made = add("export", export, "write the adapter as a folder that PEFT loads")
    made.add_argument("folder", type=Path, help="where to; made new")
    merging(add("merge", merge, "write base and adapter as one plain transformers folder"))
    add("report", report, "write report.html anew")
    comparing(add("compare", compare, "one table over runs, grouped over seeds; CSV, and a page with plots", run=False))
    on = add("resume", resume, "go on with a run in its directory, or make it longer")
    on.add_argument("overrides", nargs="*", help="what is to differ: loop.steps=200, checkpoint.allow=[optim.lr] …")
    add("verify", verify, "read all files of a run again that have a hash, and name those that are damaged")
    again = add("replay", replay, "train the first steps again, elsewhere, and compare them bit for bit")
    again.add_argument("--steps", type=int, default=20, help="how many (20); weights are compared at the first 20")
    combining(add("combine", combine, "write one adapter made of several", run=False))
    measuring(add("bench", bench, "measure how fast a configuration trains, in a process of its own", run=False))
    look = add("config", config, "explain a key of the configuration, or show the whole of a command's", run=False)
    look.add_argument("what", choices=["explain", "show"])
    look.add_argument("overrides", nargs="*", help="explain: keys or groups; both: overrides as for train.py")
    shell = add("completions", completions, "print a script that completes all this in a shell", run=False)
    shell.add_argument("shell", choices=["bash", "zsh"])
    test = add("check", check, "hold an adapter class to what it promises", run=False)
    test.add_argument("adapter", help="my_package.my_module:MyAdapter")
    test.add_argument("overrides", nargs="*", metavar="OPTION=VALUE", help="options of its constructor")
    return top


def looking(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", choices=["data", "plan", "adapter"])
    command.add_argument(
        "overrides", nargs="*", help="as for train.py: data=jsonl data.path=FILE …; or run directories"
    )
    command.add_argument("--limit", type=int, default=5, help="rows of data to show (5)")
    command.add_argument("--json", action="store_true", help="adapter: JSON instead of a table")


def planning(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", help="as for train.py")
    command.add_argument("--budget", metavar="SIZE", help="list the settings that fit it: 24GiB, 24GB, 800MB")
    command.add_argument("--no-speed", action="store_true", help="do not measure this machine (ten seconds, once)")


def merging(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, help="where to; made new")
    command.add_argument("--to", choices=["dense", "nf4"], default="dense", help="what the weights become (dense)")
    command.add_argument("--method", choices=["naive", "best"], default="best", help="of rounding to nf4 (best)")
    command.add_argument(
        "--min-share", type=float, default=0.5, help="refuse if less of the adapter's effect survives (0.5)"
    )


def combining(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, help="where to; made new")
    command.add_argument("adapters", nargs="+", metavar="ADAPTER[=WEIGHT]", help="runs or adapter folders")
    command.add_argument("--method", choices=["sum", "ties", "dare"], default="sum", help="sum is Σ wᵢ ΔWᵢ")
    command.add_argument("--rank", type=int, help="cut to this rank by SVD; without it a sum is exact")
    command.add_argument("--density", type=float, default=0.5, help="share of entries that ties and dare keep (0.5)")
    command.add_argument("--seed", type=int, default=0, help="of dare's draw (0)")


def sampling(command: argparse.ArgumentParser) -> None:
    """Settings of generation; what is not given comes from the run's ``eval.generate``."""
    command.add_argument("--max-new-tokens", type=int)
    command.add_argument("--do-sample", action=argparse.BooleanOptionalAction, default=None)
    command.add_argument("--temperature", type=float)
    command.add_argument("--top-p", type=float)
    command.add_argument("--num-return-sequences", type=int)
    command.add_argument("--seed", type=int)


def inspect(arguments: Any) -> None:
    from lowrank import assemble
    from lowrank import inspect as looks

    if arguments.what == "adapter":
        show_spectra([Path(word) for word in arguments.overrides], arguments.json)
        return
    if arguments.what == "plan" and any(Path(word).is_dir() for word in arguments.overrides):
        show_plans([Path(word) for word in arguments.overrides])
        return
    config = compose.compose(arguments.overrides)
    parts = assemble.parts(config)
    if arguments.what == "plan":
        print(parts.plan)
        return
    data = assemble.data(config, parts.tokenizer)
    color = looks.wants_color(sys.stdout)
    print(looks.data_masks(data.train, parts.tokenizer, arguments.limit, color=color))


def plan(arguments: Any) -> None:
    from lowrank.commands.plan import plan as planned

    for text in planned(arguments.overrides, arguments.budget, measured=not arguments.no_speed):
        print(text, flush=True)


def show_plans(folders: Sequence[Path]) -> None:
    """A run's plan, or what differs between the plans of two."""
    from lowrank import run

    if len(folders) > 2:
        raise ConfigError(f"inspect plan: {len(folders)} runs are not allowed; one, or two to compare.")
    plans = [run.open(folder).recorded_plan for folder in folders]
    print(plans[0].diff(plans[1]) if len(plans) == 2 else plans[0])


def show_spectra(folders: Sequence[Path], as_json: bool) -> None:
    """What one run's adapter has learnt, or two runs' beside their overlap."""
    import json

    from lowrank import inspect as looks
    from lowrank import run

    if not 1 <= len(folders) <= 2:
        raise ConfigError(f"inspect adapter: {len(folders)} runs are not allowed; one, or two to compare.")
    runs = [run.open(folder) for folder in folders]
    run.refuse_two_bases(runs[0], runs[-1])
    found = looks.spectra([one.model for one in runs])
    print(json.dumps(found.to_dict(), indent=1) if as_json else found)


def evaluate(arguments: Any) -> None:
    import json

    from lowrank import assemble
    from lowrank.record.directory import finite

    run = opened(arguments)
    config = compose.changed(run.config, arguments.overrides, allowed=("data", "eval"))
    data = assemble.data(config, run.tokenizer)
    evaluator = assemble.evaluator(config, run.parts, data, run.loaded)
    print(json.dumps(finite(evaluator.whole(run.model).metrics), indent=2, ensure_ascii=False))


def export(arguments: Any) -> None:
    from lowrank.export.merged import refuse_occupied
    from lowrank.export.peft import export_peft

    refuse_occupied(arguments.folder)
    run = opened(arguments)
    print(export_peft(run.model, arguments.folder, base_name=run.config.model.name))


def merge(arguments: Any) -> None:
    from lowrank.export.merged import save_merged

    run = opened(arguments)
    options = {"to": arguments.to, "method": arguments.method, "min_share": arguments.min_share}
    print(save_merged(run.model, run.tokenizer, arguments.folder, **options, **run.probes()))


def combine(arguments: Any) -> None:
    from lowrank.adapters.combine import combine as combined

    folders, weights = zip(*(weighted(word) for word in arguments.adapters), strict=True)
    options = {name: getattr(arguments, name) for name in ("method", "rank", "density", "seed")}
    print(combined(folders, weights, arguments.folder, **options))


def weighted(word: str) -> tuple[Path, float]:
    """``outputs/A=0.5`` → the folder of its adapter, and 0.5; 1 where no weight is given."""
    name, equals, weight = word.rpartition("=")
    try:
        folder, factor = (Path(name), float(weight)) if equals else (Path(word), 1.0)
    except ValueError as error:
        raise ConfigError(f"combine: '{word}': {weight} is not a weight; write FOLDER=0.5.") from error
    run = folder / "adapter"
    return (run if run.is_dir() else folder), factor


def check(arguments: Any) -> None:
    from lowrank.testing import conformance, options_of

    sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it: the user's own module
    cls, options = options_of(arguments.adapter, arguments.overrides)
    found = conformance(cls, **options)
    print(found)
    sys.exit(0 if found.passed else 1)


def resume(arguments: Any) -> None:
    from lowrank.train.stopping import Stopping

    with (
        Stopping().installed() as stopping,
        stopping.held(),
    ):  # a run heeds signals; modules that import would swallow one
        from lowrank.commands.continued import resume as go_on
        from lowrank.report import terminal

        done = go_on(arguments.run, arguments.overrides, stopping)
        terminal.closing(arguments.run, done.summary, done.samples)


def verify(arguments: Any) -> None:
    from lowrank.record.verify import verify as verified

    damaged: list[str] = []
    for found in verified(arguments.run):
        print(found)
        damaged += found.faults
    if damaged:
        raise RefusedError("\n".join([f"{arguments.run}: {len(damaged)} damaged:", *damaged]))


def replay(arguments: Any) -> None:
    from lowrank.commands.replay import replay as replayed

    if arguments.steps < 1:
        raise ConfigError(f"--steps: {arguments.steps} is not allowed; a positive integer.")
    found = replayed(arguments.run, arguments.steps)
    print(found)
    sys.exit(0 if found.equal else RefusedError.exit_code)


def config(arguments: Any) -> None:
    from lowrank.commands.config import explained, shown

    print("\n".join((explained if arguments.what == "explain" else shown)(arguments.overrides)))


def completions(arguments: Any) -> None:
    from lowrank.commands.completions import completions as script

    print(script(parser(), compose.find_conf(), arguments.shell))


def report(arguments: Any) -> None:
    from lowrank.report.run import write

    print(write(opened(arguments).folder))


if __name__ == "__main__":
    main()
