"""The commands that let a run's model speak: ``lowrank generate`` and ``lowrank chat``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowrank import compose

if TYPE_CHECKING:
    from lowrank.run import Run


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
