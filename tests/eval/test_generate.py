from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from lowrank.errors import ConfigError
from lowrank.eval.generate import draw, generate
from lowrank.models.tiny import byte_tokenizer, tiny_gpt2, tiny_llama

TOKENIZER = byte_tokenizer(adds_bos=False)
PROMPTS = [list(text.encode()) for text in ("def f(x):", "a", "the quick brown fox", "xy", "return", "0123456789")]


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """In fp64, where a batch's padding cannot decide a tie; layers strong enough that greedy text is not one token."""
    model = request.param().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and (".layers." in name or ".h." in name):
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_text_does_not_depend_on_the_batch(model: PreTrainedModel, do_sample: bool) -> None:
    settings = {"max_new_tokens": 12, "do_sample": do_sample, "top_p": 0.95, "seed": 3}
    alone = generate(model, TOKENIZER, PROMPTS, batch=1, **settings)
    assert generate(model, TOKENIZER, PROMPTS, batch=4, **settings) == alone
    assert generate(model, TOKENIZER, PROMPTS, batch=64, **settings) == alone
    assert generate(model, TOKENIZER, PROMPTS[:2], batch=2, **settings) == alone[:2]


def test_greedy_text_is_what_the_models_own_generate_gives(model: PreTrainedModel) -> None:
    ours = generate(model, TOKENIZER, PROMPTS, batch=4, max_new_tokens=12)
    assert len({text for (text,) in ours}) == len(PROMPTS)
    for prompt, (text,) in zip(PROMPTS, ours, strict=True):
        own = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :]
        assert text == TOKENIZER.decode(own, skip_special_tokens=True)


def test_the_seed_alone_decides_a_sample(model: PreTrainedModel) -> None:
    def sample(seed: int) -> list[list[str]]:
        return generate(
            model, TOKENIZER, PROMPTS[:3], max_new_tokens=8, do_sample=True, num_return_sequences=2, seed=seed
        )

    first = sample(0)
    torch.manual_seed(99)
    assert sample(0) == first
    assert sample(1) != first
    assert len({text for row in first for text in row}) == 6  # each sequence of each prompt draws for itself


def test_nothing_of_the_model_or_torchs_generators_changes(model: PreTrainedModel) -> None:
    model.train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    settings, state = model.generation_config, torch.get_rng_state()
    generate(model, TOKENIZER, PROMPTS[:2], max_new_tokens=3, do_sample=True)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_while_generating() -> None:
    model = tiny_gpt2().double()
    expected = generate(model, TOKENIZER, PROMPTS[:2], max_new_tokens=8)
    assert generate(model.train(), TOKENIZER, PROMPTS[:2], max_new_tokens=8) == expected


def test_settings_that_came_with_the_model_do_not_count(model: PreTrainedModel) -> None:
    expected = generate(model, TOKENIZER, PROMPTS[:2], max_new_tokens=12)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, min_new_tokens=12, eos_token_id=257, max_length=5
    )
    assert generate(model, TOKENIZER, PROMPTS[:2], max_new_tokens=12) == expected


def test_a_text_stops_before_an_end_token_of_tokenizer_model_or_caller(model: PreTrainedModel) -> None:
    prompt = PROMPTS[0]
    tokens = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
    third = next(token for token in tokens[2:] if token not in tokens[:2])
    expected = [[TOKENIZER.decode(tokens[: tokens.index(third)], skip_special_tokens=True)]]
    assert generate(model, TOKENIZER, [prompt], max_new_tokens=12, stop=[third]) == expected
    model.generation_config.eos_token_id = [257, third]
    assert generate(model, TOKENIZER, [prompt], max_new_tokens=12) == expected


def test_an_empty_prompt_and_no_prompt_are_allowed(model: PreTrainedModel) -> None:
    assert generate(model, TOKENIZER, [], max_new_tokens=3) == []
    assert generate(model, TOKENIZER, [[]], max_new_tokens=3) == generate(
        model, TOKENIZER, [[TOKENIZER.bos_token_id]], max_new_tokens=3
    )


def test_greedy_sequences_of_one_prompt_are_the_same_text(model: PreTrainedModel) -> None:
    ((first, second),) = generate(model, TOKENIZER, PROMPTS[:1], max_new_tokens=4, num_return_sequences=2)
    assert first == second


def test_a_prompt_without_room_is_refused_before_anything_is_generated(model: PreTrainedModel) -> None:
    assert len(generate(model, TOKENIZER, [[65] * 1020], max_new_tokens=4)) == 1
    with pytest.raises(ConfigError, match=r"5 after a prompt of 1,020 tokens exceeds the model's 1,024 positions"):
        generate(model, TOKENIZER, [[65] * 1020], max_new_tokens=5)


def test_each_token_is_drawn_with_its_probability() -> None:
    scores = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, 0.5]])
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for temperature in (0.5, 1.0, 3.0):
        chosen = draw(scores.expand(len(uniform), -1), uniform, temperature, 1.0)
        share = torch.bincount(chosen, minlength=5) / len(uniform)
        assert (share - torch.softmax(scores[0].double() / temperature, -1)).abs().max() <= 1e-5


def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it() -> None:
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for top_p, kept in ((0.3, [1]), (0.5, [1, 3]), (0.69, [1, 3]), (0.75, [1, 3, 4]), (0.999, [0, 1, 2, 3, 4])):
        chosen = draw(p.log().expand(len(uniform), -1), uniform, 1.0, top_p)
        share = torch.bincount(chosen, minlength=5) / len(uniform)
        expected = torch.zeros(5, dtype=torch.float64)
        expected[kept] = p[kept] / p[kept].sum()
        assert (share - expected).abs().max() <= 2e-4


def test_sampled_first_tokens_follow_the_models_distribution() -> None:
    model, draws = tiny_llama(), 4000
    (texts,) = generate(
        model,
        TOKENIZER,
        PROMPTS[:1],
        batch=draws,
        max_new_tokens=1,
        do_sample=True,
        temperature=0.5,
        num_return_sequences=draws,
    )
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor(PROMPTS[:1])).logits[0, -1].double() / 0.5, -1)
    expected: Counter[str] = Counter()  # by text: bytes that are no text of their own decode alike
    for token, probability in enumerate(p.tolist()):
        expected[TOKENIZER.decode([token], skip_special_tokens=True)] += draws * probability
    seen = Counter(texts)
    statistic = sum((seen[text] - count) ** 2 / count for text, count in expected.items())
    freedom = len(expected) - 1
    assert abs(statistic - freedom) <= 4 * (2 * freedom) ** 0.5
