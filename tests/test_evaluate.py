"""What a run's evaluation measures on its examples."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import sacrebleu
import torch
from transformers import LlamaForCausalLM

from lowrank.config import Eval, Generate
from lowrank.data.chat import Example
from lowrank.data.pack import pack
from lowrank.evaluate import Evaluator
from lowrank.models.tiny import byte_tokenizer, tiny_llama
from lowrank.train.loss import target_loss

TOKENIZER = byte_tokenizer(adds_bos=False)
TAIL = " and what was cut from the training text"


def example(row: int, prompt: str, response: str) -> Example:
    asked, answer = (tuple(TOKENIZER(text).input_ids) for text in (prompt, response))
    target = (False,) * len(asked) + (True,) * len(answer)
    return Example(row, asked + answer, target, prompt, response)


def evaluator(examples: list[Example]) -> Evaluator:
    drawn = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "num_return_sequences": 1, "seed": 0}
    generate = Generate(limit=9, batch=4, max_new_tokens=12, **drawn)
    return Evaluator(
        TOKENIZER,
        examples,
        Eval(before=False, every=0, limit=None, generate=generate),
        collate=pack,
        loss=target_loss,
        autocast=nullcontext,
        stop=(),
        seed=0,
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
