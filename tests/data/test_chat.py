"""Templates and masks: the bytes of a prompt, which tokens are learnt, and what generation starts from."""

from __future__ import annotations

import random
import time

import pytest
from byte_bpe import CHATML, bpe
from transformers import PreTrainedTokenizerFast

from lowrank.data import chat
from lowrank.data.sources import Record
from lowrank.errors import ConfigError, DataError

TEXTS = ["a", "Return the area.", "two\nlines\n", "  spaces  ", "Grüße, 你好 🙂", "x\ty", "def f():\n    return 1"]


def record(instruction: str = "Ask.", input: str = "", response: str = "Answer.", row: int = 1) -> Record:
    return Record(row, {"instruction": instruction, "input": input, "response": response})


def make(
    records: list[Record],
    tokenizer: PreTrainedTokenizerFast,
    template: str = "instruction",
    train_on: str = "response",
    max_length: int = 1000,
) -> list[chat.Example]:
    found, dropped = chat.examples(records, tokenizer, template=template, train_on=train_on, max_length=max_length)
    assert dropped == 0
    return found


def random_records(count: int) -> list[Record]:
    draw = random.Random(count)
    texts = [" ".join(draw.choices(TEXTS, k=draw.randint(1, 5))) for _ in range(3 * count)]
    inputs = [text if draw.random() < 0.7 else "" for text in texts[1::3]]
    parts = zip(texts[::3], inputs, texts[2::3], strict=True)
    return [record(*three, row=row) for row, three in enumerate(parts, 1)]


def learnt(example: chat.Example) -> list[int]:
    return [token for token, is_target in zip(example.tokens, example.target, strict=True) if is_target]


def templates(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return ["instruction", "chat"] if tokenizer.chat_template else ["instruction"]


# ── the templates ────────────────────────────────────────────────────────────────────────────────────────


def test_the_instruction_template_is_these_bytes(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    full, short = make([record("Do.", "x = 1", "Done."), record("Do.", "", "Done.")], plain_tokenizer)
    assert plain_tokenizer.decode(full.tokens) == (
        "### Instruction:\nDo.\n\n### Input:\nx = 1\n\n### Response:\nDone.<|im_end|>"
    )
    assert plain_tokenizer.decode(short.tokens) == "### Instruction:\nDo.\n\n### Response:\nDone.<|im_end|>"
    assert full.prompt == "### Instruction:\nDo.\n\n### Input:\nx = 1\n\n### Response:\n"
    assert full.reference == "Done."


def test_a_beginning_token_stands_once_at_the_start_where_the_tokenizer_adds_it(
    plain_tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    for tokenizer, times in ((plain_tokenizer, 0), (bos_tokenizer, 1)):
        [example] = make([record()], tokenizer)
        assert example.tokens.count(tokenizer.bos_token_id) == times
    assert example.tokens[0] == bos_tokenizer.bos_token_id
    assert not example.target[0]


def test_the_chat_template_is_the_tokenizer_s_own(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    [example] = make([record("Do.", "x = 1", "Done.")], chat_tokenizer, "chat")
    assert chat_tokenizer.decode(example.tokens) == (
        "<|im_start|>user\nDo.\n\nx = 1<|im_end|>\n<|im_start|>assistant\nDone.<|im_end|>"
    )
    assert chat_tokenizer.decode(learnt(example)) == "Done.<|im_end|>"


def test_the_chat_template_s_own_end_marker_is_learnt_and_nothing_after_it() -> None:
    # the marker is not the end token, as with Llama 3's <|eot_id|>
    template = CHATML.replace("<|im_end|>' + '\\n'", "<pad>' + '\\nbye\\n'").replace("<|im_end|>", "<pad>")
    assert template != CHATML
    tokenizer = bpe(bos=False, chat_template=template)
    assert tokenizer.convert_ids_to_tokens(chat.ending(tokenizer, "chat")) == ["<pad>"]
    [example] = make([record()], tokenizer, "chat")
    assert tokenizer.decode(learnt(example)) == "Answer.<pad>"


def test_a_chat_template_without_an_end_marker_gets_the_end_token() -> None:
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = bpe(bos=False, chat_template=bare + "{% if add_generation_prompt %}assistant: {% endif %}")
    [example] = make([record()], tokenizer, "chat")
    assert tokenizer.decode(example.tokens) == "user: Ask.\nassistant: Answer.<|im_end|>"


def test_what_a_chat_template_does_to_a_response_is_what_is_learnt() -> None:
    thinking = CHATML.replace(
        "m['role'] + '\n' + m['content']",
        "m['role'] + '\n' + ('<think></think>' if m['role'] == 'assistant' else '') + m['content'] | trim",
    )
    assert thinking != CHATML
    tokenizer = bpe(bos=False, chat_template=thinking)
    [example] = make([record(response="  Answer. ")], tokenizer, "chat")
    assert tokenizer.decode(learnt(example)) == "<think></think>Answer.<|im_end|>"
    assert example.reference == "  Answer. "


def test_the_day_of_the_run_is_not_in_the_tokens() -> None:
    dated = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + CHATML
    [example] = make([record()], bpe(bos=False, chat_template=dated), "chat")
    assert example.prompt.startswith(chat.DATE)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "is missing"),
        (CHATML.replace("m['content']", "m['content'] | upper"), "does not print the response as it is"),
        (CHATML.replace("assistant\n' }}", "assistant\n<think>' }}"), "does not continue its own generation prompt"),
        ("{{ raise_exception('no users') }}", "fails (no users)"),
        ("{% for m in messages %}", "fails ("),
    ],
)
def test_a_chat_template_that_cannot_be_trained_with_names_the_model_and_the_way_out(
    template: str | None, reason: str
) -> None:
    tokenizer = bpe(bos=False, chat_template=template)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ConfigError) as caught:
        make([record()], tokenizer, "chat")
    assert str(caught.value).startswith(f"data.template: the chat template of 'some/model' {reason}")
    assert str(caught.value).endswith("Use data.template=instruction.")


def test_plain_is_the_text_as_it_is_and_every_token_but_the_first_is_learnt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for train_on in ("response", "all"):
        for text in TEXTS:
            [example] = make([Record(1, {"text": text})], tokenizer, "plain", train_on)
            assert tokenizer.decode(example.tokens[:-1], skip_special_tokens=True) == text
            assert example.tokens[-1] == tokenizer.eos_token_id
            assert example.target == (False,) + (True,) * (len(example.tokens) - 1)
            assert (example.prompt, example.reference) == ("", text)


# ── the mask ─────────────────────────────────────────────────────────────────────────────────────────────


def test_exactly_the_response_and_its_end_are_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    records = random_records(60)
    for template in templates(tokenizer):
        for example, source in zip(make(records, tokenizer, template), records, strict=True):
            first = example.target.index(True)
            assert example.target == (False,) * first + (True,) * (len(example.tokens) - first)
            assert tokenizer.decode(learnt(example)) == source.fields["response"] + "<|im_end|>"
            assert tokenizer.decode(example.tokens[:first], skip_special_tokens=False).endswith(example.prompt)


def test_generation_starts_from_the_tokens_that_training_saw(tokenizer: PreTrainedTokenizerFast) -> None:
    records = random_records(60)
    for template in templates(tokenizer):
        for example, source in zip(make(records, tokenizer, template), records, strict=True):
            prompt = chat.prompt_tokens(tokenizer, source.fields["instruction"], source.fields["input"], template)
            assert tuple(prompt) == example.tokens[: example.target.index(True)]


def test_a_prompt_of_plain_is_the_beginning_of_the_text_that_continues_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    [example] = make([Record(1, {"text": "Return the area."})], tokenizer, "plain")
    assert tuple(chat.prompt_tokens(tokenizer, "Return the area.", "", "plain")) == example.tokens[:-1]


def test_a_response_s_tokens_do_not_depend_on_its_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    for response in TEXTS:
        left, right = make([record("a", "", response), record("b\n", "c", response)], tokenizer)
        assert learnt(left) == learnt(right)


def test_the_mask_is_the_same_whatever_the_padding_token_is() -> None:
    records = random_records(30)
    same, apart = (
        make(records, bpe(bos=False, chat_template=CHATML, pad=pad), "chat") for pad in ("<|im_end|>", "<pad>")
    )
    assert same == apart
    assert all(example.target[-1] for example in same)


def test_train_on_all_learns_every_token_but_the_first(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in templates(tokenizer):
        [some], [every] = (make([record()], tokenizer, template, on) for on in ("response", "all"))
        assert every.tokens == some.tokens
        assert every.target == (False,) + (True,) * (len(every.tokens) - 1)


def test_an_empty_response_still_learns_to_end(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in templates(tokenizer):
        [example] = make([record(response="")], tokenizer, template)
        assert learnt(example) == [tokenizer.eos_token_id]


def test_one_record_gives_what_it_gives_among_others(tokenizer: PreTrainedTokenizerFast) -> None:
    records = random_records(20)
    for template in templates(tokenizer):
        together = make(records, tokenizer, template)
        options = {"template": template, "train_on": "response", "max_length": 1000}
        assert [chat.example(r, tokenizer, **options) for r in records] == together


# ── truncation ───────────────────────────────────────────────────────────────────────────────────────────


def test_truncation_cuts_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    [whole] = make([record(response="A long answer, " * 9)], tokenizer)
    first = whole.target.index(True)
    for length in (first + 1, first + 5, len(whole.tokens) - 1, len(whole.tokens), len(whole.tokens) + 1):
        [cut] = make([record(response="A long answer, " * 9)], tokenizer, max_length=length)
        assert cut.tokens == whole.tokens[:length]
        assert cut.target == whole.target[:length]
        assert (cut.prompt, cut.reference) == (whole.prompt, whole.reference)


def test_truncation_in_a_tokenizer_s_own_file_is_not_applied() -> None:
    cutting = bpe(bos=False)
    cutting.backend_tokenizer.enable_truncation(4)
    cutting.backend_tokenizer.enable_padding(length=500)
    assert make([record()], cutting) == make([record()], bpe(bos=False))


def test_examples_without_a_target_are_counted_and_the_first_is_named(
    plain_tokenizer: PreTrainedTokenizerFast,
) -> None:
    records = [record("Ask." * 40 if row % 100 == 12 else "Ask.", row=row) for row in range(1, 3606)]
    options = {"template": "instruction", "train_on": "response", "max_length": 64}
    with pytest.raises(DataError) as caught:
        chat.examples(records, plain_tokenizer, **options)
    assert str(caught.value) == (
        "data: 36 of 3,605 examples have no target token after truncation to 64 (first: row 12). "
        "Raise data.max_length or set data.on_empty=drop."
    )
    with pytest.raises(DataError, match="36 of 3,605 evaluation examples have"):
        chat.examples(records, plain_tokenizer, **options, what="eval")
    kept, dropped = chat.examples(records, plain_tokenizer, **options, on_empty="drop")
    assert (len(kept), dropped) == (3569, 36)
    assert [example.row for example in kept] == [row for row in range(1, 3606) if row % 100 != 12]


@pytest.mark.parametrize("on_empty", ["error", "drop"])
def test_nothing_left_after_truncation_is_always_an_error(
    on_empty: str, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError) as caught:
        chat.examples(
            [record(), record()],
            plain_tokenizer,
            template="instruction",
            train_on="response",
            max_length=4,
            on_empty=on_empty,
        )
    assert str(caught.value) == (
        "data: all 2 examples have no target token after truncation to 4 (first: row 1). Raise data.max_length."
    )


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = bpe(bos=False)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no end token"):
        make([record()], tokenizer)


def test_thousands_of_rows_take_a_second_or_two(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    records = random_records(3600)
    for template in templates(chat_tokenizer):
        started = time.process_time()
        make(records, chat_tokenizer, template)
        assert time.process_time() - started < 5  # under 1 s measured
