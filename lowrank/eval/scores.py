"""ROUGE, BLEU and chrF of generated texts, on a scale of 0 to 100.

ROUGE is the rouge-score package's, without stemming (which is for English alone), over a tokenizer that reads
every script: the package's own drops each letter that is not ASCII, so that Russian or Chinese scores 0. On
ASCII text the two are the same. BLEU and chrF are the corpus scores of sacrebleu with its defaults, which the
signatures name.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TypedDict

import regex  # type: ignore[import-untyped]
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import BLEU, CHRF

# Scripts written without spaces: one token for each character and its marks. Else a run of letters, marks, digits.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
TOKEN = regex.compile(rf"{UNSPACED}\p{{M}}*|(?:(?!{UNSPACED})[\p{{L}}\p{{M}}\p{{N}}])+")


class Scores(TypedDict):
    """Scores are 0 to 100; a signature says with which settings and version one was computed."""

    rouge1: float
    rouge2: float
    rougeL: float
    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


def scores(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """ROUGE F-measures averaged over examples; BLEU and chrF of the whole corpus. An empty text scores 0.

    ValueError for no predictions, or another number of them than of references.
    """
    bleu, chrf = BLEU(), CHRF()
    rouge = _rouge(predictions, references, ["rouge1", "rouge2", "rougeL"])
    means = {kind: sum(values) / len(values) for kind, values in rouge.items()}
    return Scores(
        rouge1=means["rouge1"],
        rouge2=means["rouge2"],
        rougeL=means["rougeL"],
        bleu=bleu.corpus_score(predictions, [references]).score,
        chrf=chrf.corpus_score(predictions, [references]).score,
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
    )


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """The ROUGE-L F-measure of each example, 0 to 100."""
    return _rouge(predictions, references, ["rougeL"])["rougeL"]


def words(text: str) -> list[str]:
    """The tokens that ROUGE compares: compatibility-normalised, case-folded, of any script."""
    return TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


class _Words(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _rouge(predictions: Sequence[str], references: Sequence[str], kinds: list[str]) -> dict[str, list[float]]:
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    scorer = RougeScorer(kinds, use_stemmer=False, tokenizer=_Words())
    rows = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return {kind: [100 * row[kind].fmeasure for row in rows] for kind in kinds}
