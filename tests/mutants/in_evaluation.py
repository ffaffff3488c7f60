"""Silent bugs in what is measured."""

from __future__ import annotations

from mutant import Mutant

HELD_OUT, GENERATE = "lowrank/eval/heldout.py", "lowrank/eval/generate.py"

MUTANTS = (
    Mutant(
        "held-out loss: a mean of the batches' means",
        HELD_OUT,
        "total += float(loss(model, batch.to(device)))\n            tokens += len(batch.targets)",
        "total += float(loss(model, batch.to(device))) / len(batch.targets)\n            tokens += 1",
        ("eval/test_heldout.py::test_every_target_token_counts_once_whatever_batch_it_is_in",),
    ),
    Mutant(
        "perplexity: a mean of the batches' own",
        HELD_OUT,
        """    total, tokens = 0.0, 0
    with evaluating(model), autocast():
        for batch in batches:
            total += float(loss(model, batch.to(device)))
            tokens += len(batch.targets)
    mean = total / tokens
    return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}
""",
        """    total, tokens, exponentials = 0.0, 0, []
    with evaluating(model), autocast():
        for batch in batches:
            found = float(loss(model, batch.to(device)))
            total += found
            tokens += len(batch.targets)
            exponentials.append(math.exp(found / len(batch.targets)))
    return {"loss": total / tokens, "perplexity": sum(exponentials) / len(exponentials)}
""",
        ("eval/test_heldout.py::test_every_target_token_counts_once_whatever_batch_it_is_in",),
    ),
    Mutant(
        "held-out loss: with dropout",
        HELD_OUT,
        "with evaluating(model), autocast():",
        "with torch.no_grad(), autocast():",
        ("eval/test_heldout.py::test_dropout_is_off_and_nothing_of_the_model_or_torchs_generators_changes",),
    ),
    Mutant(
        "evaluation: leaves every module in training mode",
        "lowrank/eval/mode.py",
        "for module in training:",
        "for module in model.modules():",
        ("eval/test_heldout.py::test_dropout_is_off_and_nothing_of_the_model_or_torchs_generators_changes",),
    ),
    Mutant(
        "ROUGE: against references that are cut like training texts",
        "lowrank/evaluate.py",
        "return [example.reference for example in self.sampled]",
        "return [self.tokenizer.decode(e.tokens[e.target.index(True) :], skip_special_tokens=True) "
        "for e in self.sampled]",
        ("test_evaluate.py::test_texts_are_scored_against_whole_references",),
    ),
    Mutant(
        "ROUGE: a tokenizer that drops all letters but ASCII's",
        "lowrank/eval/scores.py",
        "use_stemmer=False, tokenizer=_Words())",
        "use_stemmer=False)",
        ("eval/test_scores.py::test_equal_texts_score_100_in_any_script",),
    ),
    Mutant(
        "generation: padded on the right",
        GENERATE,
        "tokens[row, width - len(prompt) :] = torch.tensor(prompt)\n        mask[row, width - len(prompt) :] = 1",
        "tokens[row, : len(prompt)] = torch.tensor(prompt)\n        mask[row, : len(prompt)] = 1",
        ("eval/test_generate.py::test_the_text_does_not_depend_on_the_batch",),
    ),
    Mutant(
        "generation: draws from the training's generator",
        GENERATE,
        'generator=key(seed, "generate", *job), dtype=torch.float64)',
        "dtype=torch.float64)",
        ("eval/test_generate.py::test_nothing_of_the_model_or_torchs_generators_changes",),
    ),
    Mutant(
        "generation: the temperature multiplies",
        GENERATE,
        "p = torch.softmax(scores.double() / temperature, dim=-1)",
        "p = torch.softmax(scores.double() * temperature, dim=-1)",
        ("eval/test_generate.py::test_each_token_is_drawn_with_its_probability",),
    ),
    Mutant(
        "generation: the token that reaches top_p is left out",
        GENERATE,
        "before = falling.cumsum(-1) - falling",
        "before = falling.cumsum(-1)",
        ("eval/test_generate.py::test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it",),
    ),
    Mutant(
        "bootstrap: a one-sided interval called two-sided",
        "lowrank/eval/stats.py",
        "torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)",
        "torch.tensor([1 - level, level], dtype=torch.float64)",
        ("eval/test_stats.py::test_the_interval_is_as_wide_as_theory_says",),
    ),
    Mutant(
        "merge report: a share of 1 less the error's square",
        "lowrank/adapters/effect.py",
        "share = 1 - math.sqrt(lost / effect)",
        "share = 1 - lost / effect",
        ("adapters/test_merge_share.py::test_the_share_is_what_its_definition_says",),
    ),
    Mutant(
        "limit: the first rows of the file, not a draw",
        "lowrank/evaluate.py",
        "[examples[i] for i in order[: settings.limit or len(order)]]",
        "[examples[i] for i in range(settings.limit or len(order))]",
        ("test_evaluate.py::test_a_limit_is_a_draw_by_the_seed_whatever_is_generated_from",),
    ),
    Mutant(
        "gain: before less after",
        "lowrank/evaluate.py",
        "asdict(bootstrap([a - b for a, b in pairs], seed=0))",
        "asdict(bootstrap([b - a for a, b in pairs], seed=0))",
        ("test_evaluate.py::test_the_gain_is_after_less_before_example_by_example",),
    ),
    Mutant(
        "base: its evaluation is found again though other examples are measured",
        "lowrank/session/session.py",
        '            "eval": {**asdict(self.config.eval), "every": None, "before": None},\n',
        "",
        ("test_evaluate.py::test_the_base_is_evaluated_anew_where_what_is_measured_differs",),
    ),
)
