"""What a run's evaluation measures, and on which examples."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from cli import SMALL, write_rows
from transformers import LlamaForCausalLM

import lowrank
from lowrank.data.chat import Example
from lowrank.data.pack import pack
from lowrank.evaluate import Evaluation, Evaluator
from lowrank.models.tiny import byte_tokenizer, tiny_llama
from lowrank.schema import Eval, Generate
from lowrank.train.loss import target_loss

TOKENIZER = byte_tokenizer(adds_bos=False)
TAIL = " and what was cut from the training text"


def example(row: int, prompt: str, response: str) -> Example:
    asked, answer = (tuple(TOKENIZER(text).input_ids) for text in (prompt, response))
    target = (False,) * len(asked) + (True,) * len(answer)
    return Example(row, asked + answer, target, prompt, response)


def evaluator(examples: list[Example], *, limit: int | None = None, generated: int = 9, seed: int = 0) -> Evaluator:
    drawn: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "num_return_sequences": 1, "seed": 0}
    generate = Generate(limit=generated, batch=4, max_new_tokens=12, **drawn)
    return Evaluator(
        TOKENIZER,
        examples,
        Eval(before=False, every=0, limit=limit, generate=generate),
        collate=pack,
        loss=target_loss,
        autocast=nullcontext,
        stop=(),
        seed=seed,
    )


def outspoken() -> LlamaForCausalLM:
    """Layers strong enough that what it says is not one token over and over."""
    model = tiny_llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ".layers." in name:
                parameter.mul_(4)
    return model


def test_texts_are_scored_against_whole_references() -> None:
    """The training texts end where the model's do: against these alone every score would be 100."""
    model = outspoken()
    prompts = [f"say {word}: " for word in ("one", "two", "three")]
    plain = evaluator([example(row, prompt, "?") for row, prompt in enumerate(prompts, 1)])
    said = dict(zip([e.prompt for e in plain.sampled], plain.generated(model).texts, strict=True))
    assert all(said.values())
    cut = [example(row, prompt, said[prompt]) for row, prompt in enumerate(prompts, 1)]
    whole = evaluator([replace(one, reference=one.reference + TAIL) for one in cut])
    found = whole.generated(model)
    assert found.texts == [said[one.prompt] for one in whole.sampled]
    references = [text + TAIL for text in found.texts]
    assert found.metrics["chrf"] == pytest.approx(sacrebleu.corpus_chrf(found.texts, [references]).score)
    assert found.metrics["chrf"] < 90


def test_a_limit_is_a_draw_by_the_seed_whatever_is_generated_from() -> None:
    """A file is often sorted: its first rows are not like the others."""
    examples = [example(row, f"say {row}: ", "?") for row in range(100)]
    draws = [
        [one.row for one in evaluator(examples, limit=30, generated=n, seed=seed).examples]
        for n, seed in ((4, 0), (30, 0), (4, 1))
    ]
    assert draws[0] == draws[1] != draws[2]
    for draw in draws:
        assert len(set(draw)) == 30
        assert 5 <= sum(row >= 50 for row in draw) <= 25
    assert [one.row for one in evaluator(examples, limit=30, generated=4).sampled] == draws[0][:4]
    assert sorted(one.row for one in evaluator(examples).examples) == list(range(100))


def test_the_gain_is_after_less_before_example_by_example() -> None:
    made = evaluator([example(row, f"say {row}: ", "one two three four") for row in range(4)])
    half, whole = "one two", "one two three four"  # ROUGE-L 2/3 and 1
    gain = made.gain(Evaluation({}, [half] * 4), Evaluation({}, [whole, whole, half, half]))
    assert gain is not None
    assert gain["mean"] == pytest.approx(100 * (1 - 2 / 3) / 2)
    assert gain["low"] < gain["mean"] < gain["high"]


@pytest.mark.parametrize("change", ["data.train_on=all", "eval.limit=1"])
def test_the_base_is_evaluated_anew_where_what_is_measured_differs(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    course = (*SMALL, "model=tiny_llama", "loop.steps=1", "checkpoint.every=0", f"data.path={rows}")

    def before(cache: str, *overrides: str) -> dict[str, Any]:
        monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / cache))
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return lowrank.train([*course, *overrides], folder).summary["eval"]["before"]

    plain = before("one")
    assert before("one") == plain
    assert before("one", change) == before("two", change) != plain
