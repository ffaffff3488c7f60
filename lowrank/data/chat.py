"""From a record to tokens and a mask: the templates, and which tokens are learnt.

Prompt and response are tokenised apart, because generation will see the prompt alone. The mask follows from
where a token stands, never from which token it is: for many models padding and the end token are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from jinja2 import TemplateError

from lowrank.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Llama 3's templates print today's date unless given one: tokens must not depend on the day of the run.
DATE = "26 Jul 2024"
PROBE = "lowrank probe"


class Row(Protocol):
    """A record: the number of its row; instruction, input and response, or text."""

    @property
    def row(self) -> int: ...
    @property
    def fields(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Example:
    """A tokenised record. ``target[i]`` says that ``tokens[i]`` is learnt, from the tokens before it.

    The first token never is. The tokens before the first target are the prompt's: generation starts from
    exactly those. ``prompt`` and ``reference`` are texts, never truncated (``plain``: an empty prompt). ``cut`` tokens
    were left out at the end.
    """

    row: int
    tokens: tuple[int, ...]
    target: tuple[bool, ...]
    prompt: str
    reference: str
    cut: int = 0


def examples(
    records: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    train_on: str,
    max_length: int,
    on_empty: str = "error",
    what: str = "train",
) -> tuple[list[Example], int]:
    """The examples that have a target token, in order, and how many were dropped for having none.

    Raises DataError where any (``on_empty="error"``), or all (``"drop"``), have none. ``what``, ``train`` or
    ``eval``, only words the error.
    """
    found = tokenised(records, tokenizer, template=template, train_on=train_on, max_length=max_length)
    kept = [example for example in found if any(example.target)]
    dropped = len(found) - len(kept)
    if dropped and (on_empty == "error" or not kept):
        count = f"{dropped:,} of {len(found):,}" if kept else f"all {dropped:,}"
        kind = "evaluation examples" if what == "eval" else "examples"
        first = next(example.row for example in found if not any(example.target))
        either = " or set data.on_empty=drop" if kept else ""
        raise DataError(
            f"data: {count} {kind} have no target token after truncation to {max_length} "
            f"(first: row {first}). Raise data.max_length{either}."
        )
    return kept, dropped


def example(
    record: Row, tokenizer: PreTrainedTokenizerBase, *, template: str, train_on: str, max_length: int
) -> Example:
    """One record tokenised, cut at ``max_length``; it may be left without a target."""
    return tokenised([record], tokenizer, template=template, train_on=train_on, max_length=max_length)[0]


def tokenised(
    records: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    train_on: str,
    max_length: int,
) -> list[Example]:
    """An example for each record: beginning + prompt + response + end, cut at the end."""
    texts = [rendered(record, tokenizer, template) for record in records]
    start, end = beginning(tokenizer, template), ending(tokenizer, template)
    prompts = encode(tokenizer, [prompt for prompt, _ in texts])
    responses = encode(tokenizer, [response for _, response in texts])
    found = []
    for record, (prompt, _), asked, answer in zip(records, texts, prompts, responses, strict=True):
        whole = (*start, *asked, *answer, *end)
        tokens = whole[:max_length]
        # Nothing stands before the first token, so it cannot be learnt.
        first = 1 if train_on == "all" or template == "plain" else max(1, len(start) + len(asked))
        target = tuple(index >= first for index in range(len(tokens)))
        reference = record.fields["text" if template == "plain" else "response"]
        found.append(Example(record.row, tokens, target, prompt, reference, len(whole) - len(tokens)))
    return found


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, instruction: str, input: str = "", template: str = "instruction"
) -> list[int]:
    """The tokens that generation starts from: those that training would put before the response.

    ``plain`` continues ``instruction`` as it stands.
    """
    text = render(tokenizer, instruction, input, template)
    return beginning(tokenizer, template) + encode(tokenizer, [text])[0]


def render(tokenizer: PreTrainedTokenizerBase, instruction: str, input: str, template: str) -> str:
    """The text of a prompt, up to where the response begins (without the beginning token)."""
    match template:
        case "plain":
            return instruction
        case "instruction":
            block = f"### Input:\n{input}\n\n" if input else ""
            return f"### Instruction:\n{instruction}\n\n{block}### Response:\n"
        case "chat":
            return conversation(tokenizer, asked(instruction, input))
    raise ConfigError(f"data.template: '{template}' is not a template. Allowed: instruction, chat, plain.")


def rendered(record: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    """The texts of a record's prompt and response, without beginning and end tokens."""
    if template == "plain":
        return "", record.fields["text"]
    instruction, input, response = (record.fields[name] for name in ("instruction", "input", "response"))
    prompt = render(tokenizer, instruction, input, template)
    if template == "chat":
        return prompt, chat_response(tokenizer, prompt, asked(instruction, input), response)
    return prompt, response


def beginning(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """The tokens the tokenizer itself puts before a text: one or none; chat templates write their own."""
    if template == "chat":
        return []
    bare, full = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    return full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)]


def ending(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """The tokens after a response, learnt: the end token, or up to a chat template's first special token.

    What a chat template writes after its end marker (mostly a line feed) is not learnt, since generation
    has stopped by then. A template without a marker gets the end token.
    """
    if template == "chat":
        [tokens] = encode(tokenizer, [chat_tail(tokenizer)])
        known = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_ids, *(token for token in known if known[token].special)}
        for index, token in enumerate(tokens):
            if token in special:
                return tokens[: index + 1]
        return encode(tokenizer, [chat_tail(tokenizer).rstrip()])[0] + end_token(tokenizer)
    return end_token(tokenizer)


def end_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token; ConfigError where it has none, since a response could never end."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model: the tokenizer of '{tokenizer.name_or_path}' has no end token (eos_token).")
    return [tokenizer.eos_token_id]


def asked(instruction: str, input: str) -> list[dict[str, str]]:
    """The user's turn of a conversation."""
    return [{"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}]


def answered(turns: list[dict[str, str]], response: str) -> list[dict[str, str]]:
    """The conversation with the assistant's turn."""
    return [*turns, {"role": "assistant", "content": response}]


def chat_response(tokenizer: PreTrainedTokenizerBase, prompt: str, turns: list[dict[str, str]], response: str) -> str:
    """The response as the chat template renders it: the whole conversation less the prompt and the tail."""
    whole, tail = conversation(tokenizer, answered(turns, response)), chat_tail(tokenizer)
    if not (whole.startswith(prompt) and whole.endswith(tail) and len(whole) >= len(prompt) + len(tail)):
        reason = "does not continue its own generation prompt with the response"
        raise chat_refused(tokenizer, reason)
    return whole[len(prompt) : len(whole) - len(tail)]


def chat_tail(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after a response, found with a response that it cannot contain."""
    _, found, tail = conversation(tokenizer, answered(asked("?", ""), PROBE)).rpartition(PROBE)
    if not found:
        raise chat_refused(tokenizer, "does not print the response as it is")
    return tail


def conversation(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    """The chat template's text; it ends where the assistant would begin if the last turn is the user's."""
    if not tokenizer.chat_template:
        raise chat_refused(tokenizer, "is missing")
    unanswered = turns[-1]["role"] == "user"
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=unanswered, date_string=DATE)
    except TemplateError as error:
        raise chat_refused(tokenizer, f"fails ({error})") from None


def chat_refused(tokenizer: PreTrainedTokenizerBase, reason: str) -> ConfigError:
    """The error for a chat template that cannot be trained with."""
    owner = f"the chat template of '{tokenizer.name_or_path}'"
    return ConfigError(f"data.template: {owner} {reason}. Use data.template=instruction.")


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, nothing added, nothing cut; one call, so a fast tokenizer uses its threads."""
    if not any(texts):
        return [[] for _ in texts]
    # verbose=False: a text longer than the model's window is cut by us, no need for a warning.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
