"""``lowrank``: what is done with a run directory, and a look at data and plans before there is one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank import compose

if TYPE_CHECKING:
    from lowrank.run import Run

EXAMPLES = """examples:
  lowrank inspect data data=jsonl data.path=my.jsonl      rows as the model reads them, targets marked
  lowrank inspect plan adapter.targets=[q_proj,v_proj]    which sites an adapter would go on
  lowrank generate outputs/RUN "Write a haiku."           the tuned model's answer, alone on standard output
  lowrank chat outputs/RUN                                the same, turn by turn
  lowrank evaluate outputs/RUN data=jsonl data.path=my.jsonl
  lowrank export outputs/RUN FOLDER                       the adapter in PEFT's format
  lowrank merge outputs/RUN FOLDER                        a plain transformers folder
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: prints one block for an error we understand and exits with its code."""
    top = parser()
    parsed, rest = top.parse_known_args(arguments)
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(parsed, "overrides")):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides that stand behind an option
        parsed.overrides += rest
    try:
        parsed.command(parsed)
    except Exception as error:
        sys.exit(compose.report(error))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="lowrank", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[Any], None], text: str, run: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=command)
        if run:
            made.add_argument("run", type=Path, help="a run directory")
        return made

    look = add("inspect", inspect, "look at a configuration's data or plan", run=False)
    look.add_argument("what", choices=["data", "plan"])
    look.add_argument("overrides", nargs="*", help="as for train.py: data=jsonl data.path=FILE …")
    look.add_argument("--limit", type=int, default=5, help="rows of data to show (5)")

    one = add("generate", generate, "print the tuned model's text for a prompt")
    one.add_argument("prompt", help="the instruction, in the run's own template; - reads it from standard input")
    one.add_argument("--input", default="", help="the template's input block")
    sampling(one)
    sampling(add("chat", chat, "talk to the tuned model"))

    held = add("evaluate", evaluate, "held-out loss and scores, on the run's data or other")
    held.add_argument("overrides", nargs="*", help="data=… and eval.… keys to change")

    for name, command, text in (
        ("export", export, "write the adapter as a folder that PEFT loads"),
        ("merge", merge, "write base and adapter as one plain transformers folder"),
    ):
        add(name, command, text).add_argument("folder", type=Path, help="where to; made new")
    add("report", report, "write report.html anew")
    return top


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

    config = compose.compose(arguments.overrides)
    parts = assemble.parts(config)
    if arguments.what == "plan":
        print(parts.plan)
        return
    data = assemble.data(config, parts.tokenizer)
    color = looks.wants_color(sys.stdout)
    print(looks.data_masks(data.train, parts.tokenizer, arguments.limit, color=color))


def opened(arguments: Any) -> Run:
    from lowrank import run

    return run.open(arguments.run)


def answers(run: Run, prompt: Sequence[int], arguments: Any) -> list[str]:
    """Texts for one prompt of token ids, with the run's settings changed by the command's."""
    from dataclasses import asdict

    from lowrank.data.chat import ending
    from lowrank.eval.generate import generate
    from lowrank.train.precision import Precision

    names = asdict(run.config.eval.generate)
    given = [f"eval.generate.{n}={v}" for n in names if (v := getattr(arguments, n, None)) is not None]
    settings = asdict(compose.changed(run.config, given, allowed=("eval",)).eval.generate)
    settings.pop("limit")
    stop = ending(run.tokenizer, run.config.data.template)[-1:]
    with Precision(run.parts.precision, run.parts.device).autocast():
        return generate(run.model, run.tokenizer, [prompt], **settings, stop=stop)[0]


def generate(arguments: Any) -> None:
    from lowrank.data.chat import prompt_tokens

    run = opened(arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    tokens = prompt_tokens(run.tokenizer, prompt, arguments.input, run.config.data.template)
    for text in answers(run, tokens, arguments):
        print(text.strip())


def chat(arguments: Any) -> None:
    """With the chat template earlier turns are part of the prompt; the other templates know single turns."""
    from lowrank.data.chat import conversation, encode, prompt_tokens

    run = opened(arguments)
    template = run.config.data.template
    print("an empty line, or Ctrl-D, ends the conversation", file=sys.stderr)
    turns: list[dict[str, str]] = []
    while line := read_line("> "):
        turns.append({"role": "user", "content": line})
        if template == "chat":
            tokens = encode(run.tokenizer, [conversation(run.tokenizer, turns)])[0]
        else:
            tokens = prompt_tokens(run.tokenizer, line, "", template)
        reply = answers(run, tokens, arguments)[0].strip()
        turns.append({"role": "assistant", "content": reply})
        print(reply)


def read_line(prompt: str) -> str:
    try:
        return input(prompt if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def evaluate(arguments: Any) -> None:
    import json

    from lowrank import assemble
    from lowrank.directory import finite

    run = opened(arguments)
    config = compose.changed(run.config, arguments.overrides, allowed=("data", "eval"))
    data = assemble.data(config, run.tokenizer)
    evaluator = assemble.evaluator(config, run.parts, data, run.loaded)
    print(json.dumps(finite(evaluator.whole(run.model).metrics), indent=2, ensure_ascii=False))


def export(arguments: Any) -> None:
    from lowrank.export.peft import export_peft

    run = opened(arguments)
    print(export_peft(run.model, arguments.folder, base_name=run.config.model.name))


def merge(arguments: Any) -> None:
    from lowrank.export.merged import save_merged

    run = opened(arguments)
    print(save_merged(run.model, run.tokenizer, arguments.folder))


def report(arguments: Any) -> None:
    from lowrank.report.run import write

    print(write(opened(arguments).folder))


if __name__ == "__main__":
    main()
