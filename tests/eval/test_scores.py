from __future__ import annotations

import random

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lowrank.eval.scores import rouge_l, scores, words


def test_known_sentences_have_their_known_scores() -> None:
    found = scores(["the cat sat on the mat"], ["the cat is on the mat"])
    assert found["rouge1"] == pytest.approx(100 * 5 / 6)
    assert found["rouge2"] == pytest.approx(100 * 3 / 5)
    assert found["rougeL"] == pytest.approx(100 * 5 / 6)


def test_equal_texts_score_100_in_any_script() -> None:
    texts = [
        "Возвращает сумму двух чисел.",
        "返回两个数字的总和。",
        "दो संख्याओं का योग लौटाता है",
        "Return the sum of two.",
    ]
    found = scores(texts, texts)
    for kind in ("rouge1", "rouge2", "rougeL", "bleu", "chrf"):
        assert found[kind] == pytest.approx(100)


def test_ascii_text_scores_as_with_rouge_scores_own_tokenizer() -> None:
    draw = random.Random(0)
    alphabet = "abcDEF019 ._-'\"()\n"
    pairs = [["".join(draw.choices(alphabet, k=60)) for _ in range(2)] for _ in range(50)]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    own = [100 * scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]
    assert rouge_l([text for text, _ in pairs], [reference for _, reference in pairs]) == pytest.approx(own)


def test_every_script_is_split_into_words_or_characters() -> None:
    assert words("Строка, Ёж!") == ["строка", "ёж"]
    assert words("返回x2的和") == ["返", "回", "x2", "的", "和"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]
    assert words("ภาษา") == ["ภ", "า", "ษ", "า"]
    assert words("e\u0301t\u00e9 ﬁn") == ["été", "fin"]
    assert words("snake_case-name") == ["snake", "case", "name"]


def test_partly_right_russian_is_between_nothing_and_all() -> None:
    (score,) = rouge_l(["возвращает сумму"], ["возвращает разность"])
    assert score == pytest.approx(50)


def test_empty_predictions_score_nothing_and_break_nothing() -> None:
    found = scores(["", ""], ["a reference", "another"])
    assert [found[kind] for kind in ("rouge1", "rouge2", "rougeL", "bleu", "chrf")] == [0] * 5
    assert rouge_l(["", "a b"], ["a b", "a b"]) == [0, pytest.approx(100)]


def test_bleu_and_chrf_are_sacrebleus_and_signed() -> None:
    texts, references = ["the cat sat on the mat today", "hello"], ["the cat sat on a mat today", "hello there"]
    found = scores(texts, references)
    assert found["bleu"] == sacrebleu.corpus_bleu(texts, [references]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(texts, [references]).score
    assert f"version:{sacrebleu.__version__}" in found["bleu_signature"]
    assert "tok:13a" in found["bleu_signature"]
    assert f"version:{sacrebleu.__version__}" in found["chrf_signature"]


def test_scores_of_nothing_or_of_unequal_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="0 predictions"):
        scores([], [])
    with pytest.raises(ValueError, match="1 predictions for 2"):
        rouge_l(["a"], ["a", "b"])
